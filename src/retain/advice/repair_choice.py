"""What a point between a base and its fine-tune kept and learned, and which point is best.

A point is chosen on one half of the items and reported on the other: the best of many has been lucky on the items by
which it was found, and its numbers on them promise too much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from retain import analysis
from retain.errors import DataError
from retain.functional import statistics
from retain.items import Rows, align, by_probe, goodness, is_divergence, sign_of
from retain.results import Estimate, ProbeInfo

#: A point holds what was learned when it has this share of it, and recovers something with that share of what was lost.
HELD, NOTABLE = 0.95, 0.1
HALVES = ("control", "held")
_NATS = "nats per token"


class Record(BaseModel):
    """Part of `repair.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Sides(Record):
    """A point on one half of the items; shares are None where it is not certain that anything was lost, or learned.

    `lost`: of the kept probes, against the base, positive = worse; `upper` its one-sided bound. `learned`: gain of the
    learned probes against the base. `recovered`: share of what the tuned model lost that is back. `holds`: share of
    what it learned that is still there. All are means over probes, items paired and resampled within probes.
    """

    lost: Estimate
    upper: float
    learned: Estimate
    recovered: Estimate | None
    holds: Estimate | None


class Point(Record):
    """A candidate with its numbers on the halves on which it was asked."""

    name: str
    family: str
    settings: dict[str, Any] = {}
    control: Sides
    held: Sides | None = None


@dataclass(frozen=True)
class Asked:
    """The probes of a repair, in halves.

    Args:
        kept, learned: infos of all probes.
        confidence: of the intervals.
    """

    kept: Sequence[ProbeInfo]
    learned: Sequence[ProbeInfo]
    confidence: float = 0.95

    def score(self, base: Rows) -> float:
        """Mean score of the base on the kept probes, larger = better."""
        old = counted(self.kept, base)
        rows = by_probe(base)
        return float(np.mean([goodness(i, analysis.score(rows[i.name], i, self.confidence).value) for i in old]))

    def units(self, base: Rows) -> tuple[str, str]:
        """In what losses, and gains, are counted."""
        kept, new = (counted(infos, base)[0].is_perplexity for infos in (self.kept, self.learned))
        return _NATS if kept else "points", _NATS if new else "points"

    def sides(self, base: Rows, tuned: Rows, point: Rows) -> Sides:
        """The numbers of a point, from the rows of the same items."""
        old, new = (counted(infos, base) for infos in (self.kept, self.learned))
        # what a point lost of the tuned model's gain is what `compare_runs` makes of a run that began at the tuned one
        kept = analysis.compare_runs(base, tuned, point, old, confidence=self.confidence)
        learned = analysis.compare_runs(tuned, base, point, new, confidence=self.confidence)
        before, after = by_probe(base), by_probe(point)
        pairs = [(sign_of(i), align(before[i.name], after[i.name], i)) for i in old]
        worse = [-sign * pair.difference for sign, pair in pairs]
        one_sided = statistics.macro_interval(worse, 2 * self.confidence - 1, [pair.weights for _, pair in pairs])
        return Sides(
            lost=kept.lost_b,
            upper=one_sided.high,
            learned=learned.saved,
            recovered=_rest(kept.ratio),
            holds=_rest(learned.ratio),
        )


def counted(infos: Sequence[ProbeInfo], rows: Rows) -> list[ProbeInfo]:
    """Probes whose changes are averaged: all that score between 0 and 1; without any of them, the perplexities.

    Raises:
        DataError: neither are there.
    """
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["probe"], []).append(row["score"])
    judged = [info for info in infos if not is_divergence(info)]
    shares = [i for i in judged if not i.is_perplexity and all(0 <= s <= 1 for s in scores.get(i.name, [2.0]))]
    found = shares or [info for info in judged if info.is_perplexity]
    if not found:
        raise DataError(f"repair: {', '.join(i.name for i in infos)}: none scores between 0 and 1. Give other probes.")
    return found


def _rest(ratio: Estimate | None) -> Estimate | None:
    if ratio is None:
        return None
    return Estimate(value=1 - ratio.value, low=1 - ratio.high, high=1 - ratio.low)


def half_of(probe: str, ids: Iterable[str]) -> dict[str, str]:
    """Item → the half it belongs to, by a fixed hash: of every probe as many on either side as can be."""
    ranked = sorted(ids, key=lambda item: hashlib.blake2b(f"repair {probe} {item}".encode()).digest())
    return {item: HALVES[place % 2] for place, item in enumerate(ranked)}


def worth(side: Sides, tuned: Sides) -> tuple[float, float]:
    """(share of what was lost that is back, share of what was learned that is there), each at most 1.

    Where the tuned model lost, or learned, nothing on these items the difference to it stands for the share.
    """
    lost, gained = tuned.lost.value, tuned.learned.value
    back = (lost - side.lost.value) / (lost if lost > 0 else 1.0)
    there = 1 + (side.learned.value - gained) / (gained if gained > 0 else 1.0)
    return min(1.0, back), min(1.0, there)


def balance(side: Sides, tuned: Sides) -> tuple[float, float, float]:
    """By what points are ordered without a budget; larger is better.

    First those that hold at least 95 % of what was learned and have at least a tenth of what was lost back, the more
    the better; then the others, by the sum of both shares, and of equal sums by what is there.
    """
    back, there = worth(side, tuned)
    if there >= HELD and back >= NOTABLE:
        return 1.0, back, there
    return 0.0, back + there, there


def within(side: Sides, tuned: Sides, lose_at_most: float) -> tuple[float, float, float]:
    """By what points are ordered under a budget: first those whose upper bound is inside, by what they learned."""
    inside = side.upper <= lose_at_most
    return float(inside), side.learned.value if inside else -side.upper, -side.lost.value


def choose(points: Sequence[Point], tuned: Point, lose_at_most: float | None = None) -> Point | None:
    """The best point by the control half; of equals the first. None where none is inside the budget.

    Args:
        points: with the tuned model among them.
    """
    if lose_at_most is None:
        return max(points, key=lambda p: balance(p.control, tuned.control))
    best = max(points, key=lambda p: within(p.control, tuned.control, lose_at_most))
    return best if best.control.upper <= lose_at_most else None


def by_family(points: Sequence[Point], tuned: Point, lose_at_most: float | None = None) -> Mapping[str, Point]:
    """Kind of move → its best point by the control half."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.family, []).append(point)

    def key(point: Point) -> tuple[float, ...]:
        if lose_at_most is None:
            return balance(point.control, tuned.control)
        return within(point.control, tuned.control, lose_at_most)

    return {family: max(mine, key=key) for family, mine in found.items()}
