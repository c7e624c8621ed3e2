"""Intervals of the shares of items lost: against the estimators, slow resampling, and simulated truth."""

import numpy as np
import pytest

from retain.functional.flip_shares import Outcomes, lost_shares
from retain.functional.forgetting import sample_forgetting


def guessed(rng, items, known, lost, k=4):
    """Right or wrong before and after when what is not known is guessed afresh."""
    knows = rng.random(items) < known
    still = knows & (rng.random(items) >= lost / known)
    return [np.where(k_, 1, rng.random(items) < 1 / k).astype(float) for k_ in (knows, still)]


def test_values_are_those_of_the_estimators():
    rng = np.random.default_rng(0)
    probes = [Outcomes(*guessed(rng, 80, 0.6, 0.2), 4), Outcomes(*guessed(rng, 60, 0.6, 0.2), [2] * 20 + [None] * 40)]
    found = lost_shares(probes)
    for place, interval in enumerate(found):
        expected = np.mean([sample_forgetting(*p)[place] for p in probes])
        assert interval.value == pytest.approx(expected)
        assert interval.low < expected < interval.high
    assert lost_shares(probes) == found
    assert lost_shares(probes, seed=1) != found


def test_resampling_equals_that_of_a_slow_loop():
    """Items with different numbers of options, resampled whole; the estimators are asked anew each time."""
    rng = np.random.default_rng(1)
    before, after = guessed(rng, 150, 0.6, 0.25)
    options = np.array([3, 4, 0])[rng.integers(0, 3, 150)]
    draws = []
    for _ in range(3000):
        picked = rng.integers(0, 150, 150)
        draws.append(sample_forgetting(before[picked], after[picked], list(options[picked]))[:3])
    ends = np.quantile(draws, [0.025, 0.975], axis=0).T
    for slow, fast in zip(ends, lost_shares([Outcomes(before, after, options)])):
        assert (fast.low, fast.high) == pytest.approx(tuple(slow), abs=0.012)


def test_no_loss_on_few_items_is_not_certain():
    right = np.ones(20)
    for interval in lost_shares([Outcomes(right, right, 4)]):
        assert interval.value == 0
        assert interval.high > 0.08
    raw, adjusted, _ = lost_shares([Outcomes(right, right)] * 5)
    assert 0.01 < raw.high < 0.08
    assert raw.low == adjusted.low == 0


@pytest.mark.parametrize(("items", "lost"), [(40, 0.0), (40, 0.15), (200, 0.02), (200, 0.15)])
def test_the_truth_is_covered(items, lost):
    """Raw: the rate of 1 → 0 that guessing makes too. Paired: what was known and is not any more."""
    rng = np.random.default_rng(2)
    known, k, runs = 0.5, 4, 150
    raw_truth = lost * (1 - 1 / k) + (1 - known) * (1 / k) * (1 - 1 / k)
    covered = np.zeros(2)
    for seed in range(runs):
        raw, _, paired = lost_shares([Outcomes(*guessed(rng, items, known, lost), k)], seed=seed)
        covered += [raw.low <= raw_truth <= raw.high, paired.low <= lost <= paired.high]
    assert (covered / runs >= 0.9).all(), covered / runs
