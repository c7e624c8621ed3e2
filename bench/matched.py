"""Comparing a method with plain training *at the same new-task score*, by the numbers of several seeds.

A method that learns less also forgets less, and so does plain training with a smaller learning rate or fewer steps.
So the opponent is not one plain run but the front of many: of all plain settings, what the best of them loses where
it has learned as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retain.functional.statistics import Interval, two_level_interval
from retain.report.front import pareto

REACHED = 0.95  # of the new-task score of plain training
SHORT = "does not reach the new score"

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One setting: `new` and `lost` are (seeds, items), 0/1 scores and before − after; the same items everywhere."""

    label: str
    new: Table
    lost: Table

    @property
    def learned(self) -> float:
        return float(self.new.mean())

    @property
    def forgotten(self) -> float:
        return float(self.lost.mean())


def plain_front(naive: Sequence[Point]) -> list[Point]:
    """The plain settings that no other one beats on both numbers, the one that learned least first."""
    return [naive[i] for i in pareto([(point.learned, -point.forgotten) for point in naive])]


def plain_loss(naive: Sequence[Point], learned: float) -> Table:
    """(seeds, items) lost by plain training where it learns this much: between two settings of the front, their
    mixture that learns as much on average; beyond its ends, the setting at the end."""
    front = plain_front(naive)
    if learned <= front[0].learned:
        return front[0].lost
    for low, high in pairwise(front):
        if learned <= high.learned:
            share = (learned - low.learned) / (high.learned - low.learned)
            return (1 - share) * low.lost + share * high.lost
    return front[-1].lost


@dataclass(frozen=True)
class Verdict:
    """`difference` is lost by the method − lost by plain training of the same new-task score, with its interval."""

    learned: Interval
    lost: Interval
    difference: Interval
    word: str


def judge(point: Point, naive: Sequence[Point], reference: float, confidence: float = 0.95) -> Verdict:
    """What can be said of a method at one setting.

    Args:
        point: its numbers, on the seeds of `naive` in the same order.
        naive: plain training at several settings.
        reference: new-task score of plain training; `REACHED` of it is asked for.
    """
    difference = interval(point.lost - plain_loss(naive, point.learned), confidence)
    if difference.high < 0:
        word = "forgets less"
    elif difference.low > 0:
        word = "forgets more"
    else:
        word = "cannot tell"
    if point.learned < REACHED * reference:
        # beyond what plain training was seen to learn nothing is compared; beaten settings count as seen
        as_little = min(plain.learned for plain in naive) <= point.learned
        word = SHORT + (", forgets less even so" if as_little and difference.high < 0 else "")
    return Verdict(interval(point.new, confidence), interval(point.lost, confidence), difference, word)


def interval(table: Table, confidence: float = 0.95) -> Interval:
    """Over seeds and items: what to expect of the next seed."""
    return two_level_interval(table, confidence)
