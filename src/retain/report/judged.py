"""The verdict in numbers: what it was drawn from, what each number means, and which thresholds were used."""

from __future__ import annotations

from typing import NamedTuple

from retain.report import wording
from retain.report.language import say
from retain.results import Estimate, Results, Thresholds, Verdict


class Row(NamedTuple):
    """One number: name, value with unit, interval (or ""), and what it means in a line."""

    name: str
    value: str
    interval: str
    meaning: str


#: The three estimators of the share of items lost.
LOST = ("forgetting_raw", "forgetting_adjusted", "forgetting_paired")


def lost_words() -> list[str]:
    """Names of the three estimators."""
    return [say(f"numbers.{key}") for key in LOST]


def rows(results: Results) -> list[Row]:
    """The table of a run; empty without a verdict."""
    verdict = results.verdict
    if verdict is None:
        return []
    found = []
    if wording.changes_of(results, "task"):
        found.append(_percent("improvement", verdict.improvement, verdict.intervals.get("improvement"), True))
    found.append(_percent("drop", verdict.forgetting, verdict.intervals.get("forgetting")))
    for key in LOST:
        if share := verdict.intervals.get(key):
            found.append(_percent(key, share.value, share))
    t = results.thresholds
    why = say("numbers.balance_why", keep=f"{t.keep_weight:g}", learn=f"{t.learn_weight:g}")
    found.append(_plain("balance", verdict.balance, verdict.intervals.get("balance"), why))
    why = say("numbers.efficiency_why", score=f"{verdict.mean_reference:.3f}")
    found.append(_plain("efficiency", verdict.stability_efficiency, verdict.intervals.get("stability_efficiency"), why))
    word = say("numbers.yes" if verdict.successful else "numbers.no")
    found.append(Row(say("numbers.successful"), word, "", _successful(verdict, t)))
    return found


def thresholds(results: Results) -> str:
    """Which thresholds stand behind "kept" and behind an alarm."""
    t = results.thresholds
    said = {"points": f"{100 * t.margin:g}", "nats": f"{t.margin_nats:g}", "alarm": f"{100 * t.alarm:g}"}
    return say("numbers.thresholds", **said)


def probes(results: Results) -> list[tuple[str, list[str]]]:
    """Old probes whose items are right or wrong: name, and the shares of items lost with intervals, "–" for none."""
    table = []
    for info, change in wording.changes_of(results, "reference"):
        cells = []
        for key in LOST:
            value, share = getattr(change, key), change.intervals.get(key)
            cells.append("–" if value is None else f"{_share(value)} {_ends(share, 100)}".strip())
        if change.forgetting_raw is not None:
            table.append((info.name, cells))
    return table


def groups(results: Results) -> list[tuple[str, list[str]]]:
    """After each stage, the mean change of every group of old probes since the base, in points with interval."""
    return [
        (
            say("stage.after", task=task),
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
        (verdict.forgetting < t.max_forgetting, say("numbers.below", limit=f"{100 * t.max_forgetting:g}")),
        (verdict.improvement > t.min_improvement, say("numbers.above", limit=f"{100 * t.min_improvement:g}")),
        (verdict.mean_reference > t.min_reference, say("numbers.good_at_all", limit=f"{t.min_reference:g}")),
    ]
    said = [say("numbers.met" if met else "numbers.not_met", condition=condition) for met, condition in parts]
    return say("numbers.all_of", parts=say("list.comma").join(said))


def _share(value: float, sign: bool = False) -> str:
    return wording.percent(wording.number(100 * value, 1, sign))


def _percent(key: str, value: float, found: Estimate | None, sign: bool = False) -> Row:
    return Row(say(f"numbers.{key}"), _share(value, sign), _ends(found, 100, sign), say(f"numbers.{key}_why"))


def _plain(key: str, value: float, found: Estimate | None, meaning: str) -> Row:
    return Row(say(f"numbers.{key}"), wording.number(value, 3), _ends(found, 1), meaning)


def _ends(found: Estimate | None, factor: int, sign: bool = False) -> str:
    if found is None:
        return ""
    digits = 1 if factor == 100 else 3
    low, high = (wording.number(factor * end, digits, sign) for end in (found.low, found.high))
    return f"[{low}, {high}]"
