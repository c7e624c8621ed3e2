"""The coordinate search: it finds the top of a hill, stays within its limit, and asks nothing twice."""

from __future__ import annotations

from retain.advice.repair_search import coordinates, neighbours


def test_it_finds_the_best_of_a_hill():
    top = {"a": 0.2, "b": 0.8, "c": 0.5}
    asked = []

    def worth(alphas):
        asked.append(tuple(alphas.values()))
        return (-sum((alphas[g] - top[g]) ** 2 for g in top),)

    best, count = coordinates(dict.fromkeys(top, 0.5), worth, most=100)
    assert best == {"a": 0.2, "b": 0.8, "c": 0.5}
    assert len(asked) == len(set(asked)) == count + 1


def test_it_keeps_to_its_limit_and_to_shares():
    best, count = coordinates({"a": 0.5, "b": 0.5}, lambda alphas: (alphas["a"] + alphas["b"],), most=3)
    assert count == 3
    assert best["a"] == 0.8
    best, count = coordinates({"a": 0.9}, lambda alphas: (alphas["a"],), most=9)
    assert best == {"a": 1.0}
    assert list(neighbours({"a": 0.0, "b": 1.0}, "a")) == [{"a": 0.3, "b": 1.0}]


def test_nothing_better_leaves_the_start():
    start = {"a": 0.5, "b": 0.5}
    assert coordinates(start, lambda alphas: (0.0,), most=9) == (start, 4)
