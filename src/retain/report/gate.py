"""A limit on forgetting, and whether a run kept to it: kept, lost, or not enough items to tell.

The rule of non-inferiority: "no significant difference" is never evidence of retention (Piaggio et al. 2012,
doi:10.1001/jama.2012.87802).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retain.errors import RunError
from retain.report import budget, wording
from retain.report.language import say
from retain.results import Estimate, Results

Outcome = Literal["kept", "lost", "not enough items to tell"]


@dataclass(frozen=True)
class Gate:
    """What a run says about a limit: the outcome, and one line that says why, in the language that is spoken."""

    outcome: Outcome
    line: str
    missed: str = ""  # a line about the run's own budget, where that was not met

    @property
    def said(self) -> str:
        """The line as it is shown: a warning where nothing is shown. Another one for a budget that was not met."""
        line = say("gate.warning", line=self.line) if self.outcome == "not enough items to tell" else self.line
        return f"{line}\n{self.missed}" if self.missed else line

    def fails(self, strict: bool = False) -> bool:
        """Whether a build should stop: when the limit was passed, and where nothing is shown, if it is strict.

        A run whose own budget was not met stops it in any case: it lost nothing because it learned nothing.
        """
        return self.outcome == "lost" or bool(self.missed) or (strict and self.outcome != "kept")


def decide(low: float, high: float, limit: float) -> Outcome:
    """Which of the three outcomes the bounds of a loss allow.

    Args:
        low, high: one-sided bounds of the loss, positive = worse, in the unit of the limit.
        limit: the largest loss that counts as kept.
    """
    return "kept" if high <= limit else "lost" if low > limit else "not enough items to tell"


def bounds(results: Results) -> Estimate | None:
    """Mean loss on old abilities (share of the score, positive = worse) with its one-sided bounds.

    The ends of the interval at 2·confidence − 1. Results of before they were stored have the wider interval at the
    confidence itself: that asks for more on both sides, and never says "kept" or "lost" where the narrower one would
    not. None where no old ability is scored from 0 to 1.
    """
    verdict = results.verdict
    macro = verdict and (verdict.one_sided or verdict.difference)
    return Estimate(value=-macro.value, low=-macro.high, high=-macro.low) if macro else None


def check(results: Results, limit: float) -> Gate:
    """Hold a finished run to a limit.

    Args:
        limit: share of the score that the old abilities may lose on average: 0.02 is 2 points.

    Raises:
        RunError: the run is not finished, trained nothing, or has no old ability that is scored from 0 to 1.
    """
    if not results.finished:
        raise RunError(
            f"fail-over: '{results.name}' is not finished ({wording.progress(results)}). Run its command again to go "
            f"on: {results.command}"
        )
    found = bounds(results)
    if found is None:
        raise RunError(
            f"fail-over: '{results.name}' measured no old ability that is scored from 0 to 1, before and after. Give a "
            "run with reference probes other than perplexity."
        )
    outcome = decide(found.low, found.high, limit)
    low, value, high = (wording.number(100 * v, 2) for v in (found.low, found.value, found.high))
    said = {"low": low, "high": high, "most": say("gate.limit", limit=f"{100 * limit:g}")}
    stored = results.verdict is not None and results.verdict.one_sided is not None
    level = say("gate.one_sided" if stored else "gate.two_sided", percent=wording.confidence(results))
    why = {"kept": "gate.why_kept", "lost": "gate.why_lost", "not enough items to tell": "gate.why_open"}[outcome]
    alarm = wording.percent(f"{100 * results.thresholds.alarm:g}")
    large = "".join(
        say(key, percent=alarm, names=say("list.comma").join(names))
        for key, names in zip(("gate.large", "gate.large_chance"), wording.large_losses(results))
        if names
    )
    word = say(f"gate.{outcome}")
    line = say("gate.line", outcome=word, value=value, why=say(why, **said), level=level, large=large)
    return Gate(outcome, line, budget.missed(results))
