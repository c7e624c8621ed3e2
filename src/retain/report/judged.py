"""The verdict in numbers: what it was drawn from, what each number means, and which thresholds were used."""

from __future__ import annotations

from typing import NamedTuple

from retain.report import wording
from retain.results import Estimate, Results, Thresholds, Verdict


class Row(NamedTuple):
    """One number: name, value with unit, interval (or ""), and what it means in a line."""

    name: str
    value: str
    interval: str
    meaning: str


#: The three estimators of the share of items lost: name and meaning.
LOST = {
    "forgetting_raw": (
        "Items lost",
        "share of old questions that were right before and are wrong after; lucky guesses that turned count too",
    ),
    "forgetting_adjusted": (
        "Items lost, chance-adjusted",
        "less what guessing alone would turn; takes off too little where the same items stay unknown",
    ),
    "forgetting_paired": (
        "Items lost, know or guess",
        "as if every answer is known or guessed afresh; takes off too much where guesses repeat, down to below 0",
    ),
}


def rows(results: Results) -> list[Row]:
    """The table of a run; empty without a verdict."""
    verdict = results.verdict
    if verdict is None:
        return []
    found = []
    if wording.changes_of(results, "task"):
        meaning = "mean gain on the new tasks as a share of the score before; from 0, any gain is 100 %"
        found.append(_percent("Improvement", verdict.improvement, verdict.intervals.get("improvement"), meaning, True))
    meaning = "mean drop of old abilities as a share of the score before; what got better counts as 0"
    found.append(_percent("Relative drop", verdict.forgetting, verdict.intervals.get("forgetting"), meaning))
    for key, (name, meaning) in LOST.items():
        if share := verdict.intervals.get(key):
            found.append(_percent(name, share.value, share, meaning))
    t = results.thresholds
    balance = f"{t.keep_weight:g} · (1 − relative drop) + {t.learn_weight:g} · (0.5 + half the improvement, at most 1)"
    found.append(_plain("Balance", verdict.balance, verdict.intervals.get("balance"), balance))
    meaning = f"balance · mean score on old abilities ({verdict.mean_reference:.3f}): kept, learned, and good at all"
    name = "Stability-efficiency"
    found.append(_plain(name, verdict.stability_efficiency, verdict.intervals.get("stability_efficiency"), meaning))
    found.append(Row("Successful", "yes" if verdict.successful else "no", "", _successful(verdict, t)))
    return found


def thresholds(results: Results) -> str:
    """Which thresholds stand behind "kept" and behind an alarm."""
    t = results.thresholds
    kept = f"{100 * t.margin:g} points ({t.margin_nats:g} nats per token for perplexity)"
    return (
        f"“Kept” is a loss of at most {kept}; an old ability that dropped by more than {100 * t.alarm:g} % of its "
        "score is named. These limits, the weights and those of “successful” are settings, under “verdict”."
    )


def probes(results: Results) -> list[tuple[str, list[str]]]:
    """Old probes whose items are right or wrong: name, and the shares of items lost with intervals, "–" for none."""
    table = []
    for info, change in wording.changes_of(results, "reference"):
        cells = []
        for key in LOST:
            value, share = getattr(change, key), change.intervals.get(key)
            cells.append("–" if value is None else f"{wording.number(100 * value)} % {_ends(share, 100)}".strip())
        if change.forgetting_raw is not None:
            table.append((info.name, cells))
    return table


def groups(results: Results) -> list[tuple[str, list[str]]]:
    """After each stage, the mean change of every group of old probes since the base, in points with interval."""
    return [
        (
            f"after {task}",
            [
                "–" if (d := deltas[place]) is None else f"{wording.points(d.value)} {_ends(d, 100, True)}"
                for deltas in results.group_deltas.values()
            ],
        )
        for place, task in enumerate(results.tasks)
        if results.group_deltas
    ]


def _successful(verdict: Verdict, t: Thresholds) -> str:
    parts = [
        (verdict.forgetting < t.max_forgetting, f"mean drop below {100 * t.max_forgetting:g} %"),
        (verdict.improvement > t.min_improvement, f"improvement above {100 * t.min_improvement:g} %"),
        (verdict.mean_reference > t.min_reference, f"mean score on old abilities above {t.min_reference:g}"),
    ]
    return "all of: " + ", ".join(f"{words} ({'met' if met else 'not met'})" for met, words in parts)


def _percent(name: str, value: float, found: Estimate | None, meaning: str, sign: bool = False) -> Row:
    return Row(name, f"{wording.number(100 * value, 1, sign)} %", _ends(found, 100, sign), meaning)


def _plain(name: str, value: float, found: Estimate | None, meaning: str) -> Row:
    return Row(name, wording.number(value, 3), _ends(found, 1), meaning)


def _ends(found: Estimate | None, factor: int, sign: bool = False) -> str:
    if found is None:
        return ""
    digits = 1 if factor == 100 else 3
    low, high = (wording.number(factor * end, digits, sign) for end in (found.low, found.high))
    return f"[{low}, {high}]"
