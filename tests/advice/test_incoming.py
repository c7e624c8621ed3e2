"""Incoming rows: what is of one kind passes, what is not is found, and repeats are counted."""

from __future__ import annotations

import numpy as np
import pytest
from advice_kit import counting, travelling
from scipy import stats

from retain.advice import incoming
from retain.advice.incoming import Incoming, compare, judge, loss_difference
from retain.advice.reading import Sample
from retain.errors import DataError
from retain.functional import two_samples
from retain.functional.two_samples import Told

REPEATS = 30


class Vectors:
    """A reader whose vectors are drawn: rows whose text begins with "far" lie elsewhere."""

    def __init__(self, seed: int, shift: float = 1.0) -> None:
        self.draw, self.shift = np.random.default_rng(seed), shift

    def vectors(self, rows, progress=lambda n: None):
        away = np.array([[self.shift * text.startswith("far")] for text in rows.texts])
        return self.draw.normal(size=(len(rows), 6)) + away

    def losses(self, rows, progress=lambda n: None):
        return np.stack([self.draw.gamma(4, 1, len(rows)) * 5, np.full(len(rows), 5.0)], 1)


def drawn(name: str, count: int, kind: str = "near") -> Sample:
    return Sample(name, [[] for _ in range(count)], [f"{kind} {name} {i * 7919 % 1009}" for i in range(count)], count)


def sample(rows: list[dict[str, str]], name: str) -> Sample:
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    return Sample(name, turns, [row["response"] for row in rows], len(rows))


@pytest.fixture
def apart(monkeypatch):
    """No two rows repeat each other: their words are made up."""
    monkeypatch.setattr(incoming, "_repeats", lambda new, seen: np.zeros(len(new), bool))


def test_rows_of_one_kind_are_called_new_at_most_as_often_as_allowed(apart, monkeypatch):
    """The level holds for the source's p; a verdict of a new kind asks for more, so it is rarer still."""
    monkeypatch.setattr(incoming, "mmd", lambda x, y, seed: two_samples.mmd(x, y, 99, seed))
    monkeypatch.setattr(incoming, "told_apart", lambda x, y, seed: two_samples.told_apart(x, y, 99, seed))
    found = [compare(drawn("a", 30), [drawn("b", 40)], Vectors(seed), seed=seed) for seed in range(REPEATS)]
    _, high = stats.binom.interval(0.999, REPEATS, 0.05)
    assert sum(one.sources[0].p <= 0.05 for one in found) <= high
    assert sum(one.kind == "new kind" for one in found) <= high


def test_a_shift_is_a_new_kind_and_asks_for_more_replay(apart):
    found = compare(drawn("a", 60, "far"), [drawn("b", 80)], Vectors(0, 1.5))
    assert (found.kind, found.advice, found.accepted) == ("new kind", "accept with more replay", False)
    assert found.sources[0].told.accuracy > 0.8


def test_the_nearest_source_decides(apart):
    found = compare(drawn("a", 150, "far"), [drawn("b", 150), drawn("c", 150, "far")], Vectors(1, 3.0))
    assert found.sources[0].name == "c"
    assert found.accepted
    assert {one.name: one.kind for one in found.sources}["b"] == "new kind"
    assert {one.name for one in found.sources} == {"b", "c", "all together"}


def test_too_few_rows_cannot_tell(apart):
    found = compare(drawn("a", 10), [drawn("b", 10)], Vectors(2))
    assert (found.kind, found.advice) == ("cannot tell", "look at it first")
    assert "too few" in found.why
    with pytest.raises(DataError, match="3 rows, too few"):
        compare(drawn("a", 3), [drawn("b", 10)], Vectors(2))


@pytest.mark.parametrize(
    ("p", "told", "kind"),
    [
        (0.5, Told(0.5, 0.45, 0.55, 0.5), "same kind"),
        (0.001, Told(0.58, 0.53, 0.63, 0.001), "same kind"),  # certain, but small
        (0.001, Told(0.62, 0.56, 0.68, 0.001), "cannot tell"),
        (0.001, Told(0.9, 0.85, 0.94, 0.001), "new kind"),
        (0.2, Told(0.7, 0.45, 0.9, 0.2), "cannot tell"),
    ],
)
def test_the_three_verdicts(p, told, kind):
    assert judge(p, told) == kind


def test_repeats_are_counted_and_asked_about(reader):
    seen = sample(counting(40), "seen")
    copied = sample([*counting(6), *travelling(10)], "new")
    found = compare(copied, [seen], reader)
    assert found.duplicates >= 6 / 16
    assert found.advice == "look at it first"
    assert not found.accepted
    twice = sample([*travelling(5, 300), *travelling(5, 300)], "twice")
    assert compare(twice, [seen], reader, losses=False).duplicates >= 0.5


def test_real_rows_of_two_kinds_are_told_apart_by_the_model(reader):
    found = compare(sample(travelling(24), "new"), [sample(counting(30), "seen")], reader)
    assert found.kind == "new kind"
    values = found.as_values()
    assert values["sources"][0]["told"]["accuracy"] == found.sources[0].told.accuracy
    assert isinstance(found, Incoming)
    assert values["accepted"] is False


def test_the_loss_difference_is_that_of_the_means_by_token():
    rng = np.random.default_rng(0)
    new, seen = (np.stack([rng.gamma(4, s, 50), rng.integers(3, 9, 50)], 1) for s in (1.0, 2.0))
    found = loss_difference(new, seen)
    expected = new[:, 0].sum() / new[:, 1].sum() - seen[:, 0].sum() / seen[:, 1].sum()
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high < 0
