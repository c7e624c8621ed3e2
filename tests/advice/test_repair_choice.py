"""Halves of the items, numbers of a point, and the rules by which one is chosen."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from retain.advice.repair_choice import Asked, Point, Sides, choose, counted, half_of
from retain.errors import DataError
from retain.results import Estimate, ProbeInfo

ITEMS = 40


def info(name: str, role: str, metric: str = "accuracy") -> ProbeInfo:
    return ProbeInfo(name=name, kind="choice", group="knowledge", role=role, metric=metric, items=ITEMS)


def rows(**right: list[int]) -> list[dict]:
    return [
        {
            "probe": name,
            "item": f"{name}-{i}",
            "score": float(score),
            "correct": bool(score),
            "tokens": 1,
            "details": "",
        }
        for name, scores in right.items()
        for i, score in enumerate(scores)
    ]


def ones(count: int) -> list[int]:
    return [1] * count + [0] * (ITEMS - count)


def test_halves_are_fixed_even_and_of_every_probe():
    names = [f"item-{i}" for i in range(41)]
    found = half_of("animals", names)
    assert Counter(found.values()) == {"control": 21, "held": 20}
    assert half_of("animals", reversed(names)) == found
    assert half_of("plants", names) != found
    # half of the items alone are split again by the same order of hashes: the first stays where it was
    first = next(name for name in names if found[name] == "control")
    assert half_of("animals", [first])[first] == "control"


def test_numbers_of_a_point_are_means_over_probes():
    asked = Asked([info("a", "reference"), info("b", "reference")], [info("new", "task")])
    base = rows(a=ones(40), b=ones(20), new=ones(4))
    tuned = rows(a=ones(20), b=ones(10), new=ones(40))
    point = rows(a=ones(30), b=ones(20), new=ones(31))
    found = asked.sides(base, tuned, point)
    lost_tuned, lost = np.mean([20, 10]) / ITEMS, np.mean([10, 0]) / ITEMS
    assert found.lost.value == pytest.approx(lost)
    assert found.recovered.value == pytest.approx(1 - lost / lost_tuned)
    assert found.learned.value == pytest.approx(27 / ITEMS)
    assert found.holds.value == pytest.approx(27 / 36)
    assert found.lost.value < found.upper <= found.lost.high
    itself = asked.sides(base, tuned, tuned)
    assert (itself.recovered.value, itself.holds.value) == (0, 1)
    start = asked.sides(base, tuned, base)
    assert (start.recovered.value, start.holds.value) == (1, 0)
    assert asked.units(base) == ("points", "points")
    assert asked.score(base) == pytest.approx(0.75)
    nothing = asked.sides(base, base, base)
    assert nothing.recovered is None
    assert nothing.holds is None


def test_only_scores_of_one_kind_are_averaged():
    texts = info("prose", "reference", "perplexity")
    table = [*rows(a=ones(3)), {"probe": "prose", "score": 80.0}]
    assert counted([texts, info("a", "reference")], table) == [info("a", "reference")]
    assert counted([texts], table) == [texts]
    with pytest.raises(DataError, match="none scores"):
        counted([info("x", "reference", "KL")], table)


def point(name: str, lost: float, learned: float, upper: float | None = None) -> Point:
    def number(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.1, high=value + 0.1)

    upper = lost + 0.05 if upper is None else upper
    side = Sides(lost=number(lost), upper=upper, learned=number(learned), recovered=None, holds=None)
    return Point(name=name, family=name, control=side)


def test_the_most_recovered_of_those_that_hold_what_was_learned():
    tuned = point("tuned", 0.4, 0.5)
    points = [tuned, point("half", 0.1, 0.30), point("near", 0.2, 0.48), point("better", 0.15, 0.475)]
    assert choose(points, tuned).name == "better"
    assert choose([tuned, point("little", 0.38, 0.5), point("half", 0.1, 0.30)], tuned).name == "half"
    assert choose([tuned, point("worse", 0.4, 0.2)], tuned).name == "tuned"
    assert choose([tuned, point("even", 0.2, 0.25)], tuned).name == "tuned"  # of equal sums that which learned more


def test_under_a_budget_the_most_learned_inside_it():
    tuned = point("tuned", 0.4, 0.5)
    points = [tuned, point("a", 0.0, 0.1), point("b", 0.01, 0.3, upper=0.08), point("c", 0.01, 0.4, upper=0.2)]
    assert choose(points, tuned, 0.1).name == "b"
    assert choose(points, tuned, 0.06).name == "a"
    assert choose(points, tuned, 0.01) is None
