"""Priorities: the draw is what the priorities say, the correction makes it unbiased, and eviction keeps the best."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from retain.errors import ConfigError
from retain.functional.priorities import (
    annealed,
    draw,
    highest,
    importance_weights,
    probabilities,
    shares,
    spread,
    term_priorities,
    words,
)

VALUES = np.array([0.0, 0.1, -3.0, 2.0, 0.5, 0.5])


def slow_probabilities(values, a, floor):
    odds = [(max(u, 0.0) + floor) ** a for u in values]
    return [one / sum(odds) for one in odds]


@pytest.mark.parametrize("a", [0.0, 0.3, 0.6, 1.0, 3.0])
def test_probabilities_are_the_formula(a):
    assert probabilities(VALUES, a, 0.01) == pytest.approx(slow_probabilities(VALUES, a, 0.01), rel=1e-12)


def test_limits_of_the_exponent():
    assert np.array_equal(probabilities(VALUES, 0.0, 0.01), np.full(6, 1 / 6))
    sharp = probabilities(VALUES, 200.0, 0.01)
    assert sharp[3] == pytest.approx(1.0)
    assert (sharp > 0).all(), "no row is ever left out"
    assert sharp.sum() == pytest.approx(1.0)
    assert np.isfinite(probabilities(np.array([1e300, 0.0]), 2.0, 1e-3)).all()


@pytest.mark.parametrize("bad", [([np.nan], 1, 1), ([np.inf], 1, 1), ([], 1, 1), ([1.0], -1, 1), ([1.0], 1, 0)])
def test_what_cannot_be_a_priority(bad):
    with pytest.raises(ConfigError, match="priorities"):
        probabilities(np.array(bad[0]), *bad[1:])


@pytest.mark.parametrize("number", [1, 4, 11])
def test_rows_are_drawn_as_the_priorities_say(number):
    """χ² of every place of the draw by itself, where the trials are independent, and of all of them together."""
    chances, trials = probabilities(VALUES, 1.0, 0.3), 4000
    drawn = np.array([draw(chances, number, np.random.default_rng([7, t])) for t in range(trials)])
    for place in range(number):
        counts = np.bincount(drawn[:, place], minlength=6)
        assert chisquare(counts, chances * trials).pvalue > 1e-4
    # the same test would notice other priorities
    counts = np.bincount(drawn[:, 0], minlength=6)
    assert chisquare(counts, probabilities(VALUES, 0.5, 0.3) * trials).pvalue < 1e-6
    assert np.bincount(drawn.ravel(), minlength=6) / trials == pytest.approx(number * chances, abs=0.05)


@pytest.mark.parametrize("number", [0, 1, 5, 9, 40])
def test_a_row_comes_as_often_as_expected_up_to_one(number):
    chances = probabilities(np.random.default_rng(0).exponential(size=30), 0.8, 0.01)
    for seed in range(50):
        rows = draw(chances, number, np.random.default_rng(seed))
        assert len(rows) == number
        counts = np.bincount(rows, minlength=30)
        assert (counts >= np.floor(number * chances - 1e-9)).all()
        assert (counts <= np.ceil(number * chances + 1e-9)).all()
    uniform = np.full(30, 1 / 30)
    assert len(set(draw(uniform, 30, np.random.default_rng(1)))) == 30


def test_drawn_rows_come_in_no_order():
    chances = np.full(4, 0.25)
    orders = {tuple(draw(chances, 4, np.random.default_rng(seed))) for seed in range(400)}
    assert orders == set(itertools.permutations(range(4)))


def test_importance_weights_are_the_formula():
    chances = probabilities(VALUES, 0.7, 0.05)
    for b in (0.0, 0.4, 1.0):
        raw = (1 / (len(chances) * chances)) ** b
        assert importance_weights(chances, b) == pytest.approx(raw / raw.max(), rel=1e-12)
    assert (importance_weights(chances, 0.0) == 1).all()


def test_full_correction_gives_the_gradient_of_the_uniform_objective():
    """By enumeration: Σ_i P(i) w_i g_i is the mean of g times a constant that does not depend on g."""
    random = np.random.default_rng(3)
    gradients = random.normal(size=(6, 5))
    chances = probabilities(VALUES, 0.9, 0.02)
    weights = importance_weights(chances, 1.0)
    constant = 1 / (1 / (6 * chances)).max()
    assert chances @ (weights[:, None] * gradients) == pytest.approx(constant * gradients.mean(0), rel=1e-12)
    half = chances @ (importance_weights(chances, 0.5)[:, None] * gradients)
    ratio = half / gradients.mean(0)
    assert np.ptp(ratio) > 1e-3, "without the full correction it is another objective"


def test_the_draws_themselves_are_unbiased_after_correction():
    """Monte Carlo over whole steps, within four standard errors."""
    random = np.random.default_rng(5)
    gradients, chances = random.normal(size=6) + 2, probabilities(VALUES, 0.9, 0.2)
    weights = importance_weights(chances, 1.0) * (1 / (6 * chances)).max()
    steps = []
    for t in range(6000):
        rows = draw(chances, 4, np.random.default_rng([11, t]))
        steps.append((weights[rows] * gradients[rows]).mean())
    error = np.std(steps) / np.sqrt(len(steps))
    assert abs(np.mean(steps) - gradients.mean()) < 4 * error
    plain = [gradients[draw(chances, 4, np.random.default_rng([11, t]))].mean() for t in range(6000)]
    assert abs(np.mean(plain) - gradients.mean()) > 10 * np.std(plain) / np.sqrt(len(plain))


def test_the_correction_rises_to_one():
    assert [annealed(0.4, t) for t in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.4, 0.4, 0.7, 1.0, 1.0])
    assert annealed(1.0, 0.3) == 1.0


def test_words_of_several_scripts():
    assert words("Ships, SEA_land 42!") == ["ships", "sea", "land", "42"]
    assert words("深度学习 is かな") == ["深", "度", "学", "习", "is", "か", "な"]
    assert words("Straße") == ["strasse"]


def test_key_terms():
    texts = ["The CAPITAL of Italy", "a sea", "capital sea"]
    assert term_priorities(texts, ["capital", "Sea"]).tolist() == [0.5, 0.5, 1.0]
    assert term_priorities(["学习", "别的"], ["学习"]).tolist() == [1.0, 0.0]


def test_rare_words():
    texts = ["a b", "a a c", "a", "", "a d d e"]
    slow = []
    for text in texts:
        own = set(text.split())
        rare = [np.log(5 / sum(word in other.split() for other in texts)) / np.log(5) for word in own]
        slow.append(sum(rare) / max(1, len(own)))
    found = term_priorities(texts)
    assert found == pytest.approx(slow, rel=1e-12)
    assert found[3] == 0
    assert found.argmax() == 4
    assert term_priorities(["alone"]).tolist() == [0.0]


def test_the_highest_stay():
    values = np.array([3.0, 1.0, 2.0, 5.0, 2.0])
    assert highest(values, 2, np.zeros(5)).tolist() == [0, 3]
    assert highest(values, 3, np.array([0, 0, 1, 0, 9])).tolist() == [0, 3, 4]
    assert highest(values, 9, np.zeros(5)).tolist() == [0, 1, 2, 3, 4]
    assert highest(values, 0, np.zeros(5)).tolist() == []


def test_a_row_without_a_value_counts_as_the_mean():
    values = np.array([np.nan, 1.0, 3.0, np.nan, -np.inf])  # mean of the known ones: 2
    assert highest(values, 1, np.zeros(5)).tolist() == [2]
    assert set(highest(values, 3, np.zeros(5))) == {0, 2, 3}
    assert highest(np.full(3, np.nan), 2, np.array([2, 0, 1])).tolist() == [0, 2]


def slow_shares(counts, number):
    kept = [0] * len(counts)
    for _ in range(min(number, sum(counts))):  # one more for the group that has least, the largest of equals
        open_ = [g for g in range(len(counts)) if kept[g] < counts[g]]
        best = min(open_, key=lambda g: (kept[g], -counts[g], g))
        kept[best] += 1
    return kept


@pytest.mark.parametrize("number", [0, 1, 5, 12, 19, 30, 99])
def test_shares_are_as_equal_as_they_can_be(number):
    for counts in ([3, 9, 1, 6], [5, 5, 5], [30], [0, 4, 0, 2]):
        assert shares(counts, number).tolist() == slow_shares(counts, number)


def test_rows_are_spread_over_groups():
    random = np.random.default_rng(0)
    groups = np.array([7] * 90 + [2] * 8 + [5] * 2)
    ties = random.random(100)
    kept = spread(groups, 30, ties)
    assert np.bincount(groups[kept], minlength=8)[[7, 2, 5]].tolist() == [20, 8, 2]
    assert sorted(kept) == kept.tolist()
    sevens = np.flatnonzero(groups == 7)
    assert set(kept[groups[kept] == 7]) == set(sevens[np.argsort(-ties[sevens])[:20]])
