"""A limit on forgetting, and whether a run kept to it: kept, lost, or not enough items to tell.

The rule of non-inferiority: "no significant difference" is never evidence of retention (Piaggio et al. 2012,
doi:10.1001/jama.2012.87802).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retain.errors import RunError
from retain.report import wording
from retain.results import Estimate, Results

Outcome = Literal["kept", "lost", "not enough items to tell"]


@dataclass(frozen=True)
class Gate:
    """What a run says about a limit: the outcome, and one line that says why."""

    outcome: Outcome
    line: str

    def fails(self, strict: bool = False) -> bool:
        """Whether a build should stop: when the limit was passed, and where nothing is shown, if it is strict."""
        return self.outcome == "lost" or (strict and self.outcome != "kept")


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
    most = f"the limit of {100 * limit:g} points"
    stored = results.verdict is not None and results.verdict.one_sided is not None
    level = f"{100 * results.confidence:g} %, {'one-sided' if stored else 'two-sided: older results'}"
    why = {
        "kept": f"the upper bound, {high}, is at most {most}",
        "lost": f"the lower bound, {low}, is above {most}",
        "not enough items to tell": f"{most} lies between the bounds {low} and {high}; more items would decide",
    }[outcome]
    large = "".join(
        f"; dropped by more than {100 * results.thresholds.alarm:g} %{doubt}: {', '.join(names)}"
        for doubt, names in zip(("", " (may be chance)"), wording.large_losses(results))
        if names
    )
    return Gate(outcome, f"{outcome}: {value} points lost on average; {why} ({level}){large}")
