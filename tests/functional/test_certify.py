"""How small a loss so many items can be sure of: against closed forms, and against the items that are needed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from retain.errors import DataError
from retain.functional.budget import items_needed, loss_bound
from retain.functional.certify import certifiable


@pytest.mark.parametrize("sizes", [[300], [60, 240], [10, 10, 10]])
def test_without_flips_it_is_the_bound_of_answers_that_are_all_the_same(sizes):
    same = np.ones(sum(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert certifiable(sizes) == pytest.approx(loss_bound(same, same, labels).upper)


def test_without_flips_one_probe_is_near_the_exact_bound_of_a_count():
    """Clopper and Pearson: none of n lost, so at most 1 − 0.05^(1/n)."""
    for items in (50, 300, 2000):
        exact = stats.binomtest(0, items, alternative="less").proportion_ci(0.95, method="exact").high
        assert certifiable([items]) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("flips", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("sizes", [[1.0], [3.0, 1.0]])
def test_it_is_the_inverse_of_the_items_that_are_needed(flips, sizes):
    shares = np.array(sizes) / sum(sizes)
    for limit in (0.01, 0.05):
        needed = items_needed(limit, 0.95, flips, sizes)
        assert certifiable(shares * needed, 0.95, flips) <= limit < certifiable(shares * (needed - 1), 0.95, flips)


def test_with_many_flips_it_goes_over_into_the_normal_form():
    """Quantiles 0.95 and 0.8 of the standard error of a mean of −1, 0 and 1."""
    items, flips = 200_000, 0.2
    normal = (stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * np.sqrt(flips / items)
    assert certifiable([items], 0.95, flips) == pytest.approx(normal, rel=0.02)


def test_four_times_in_five_the_bound_is_no_larger():
    """Drawn: 3,000 items of which one in twenty flips, as often to right as to wrong."""
    random, sure = np.random.default_rng(0), certifiable([3000], 0.95, 0.05)
    uppers = []
    for _ in range(300):
        change = random.choice([-1.0, 0.0, 1.0], 3000, p=[0.025, 0.95, 0.025])
        before = np.where(change < 0, 1.0, np.where(change > 0, 0.0, 1.0))
        uppers.append(loss_bound(before, before + change, np.zeros(3000)).upper)
    assert np.mean(np.array(uppers) <= sure) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(("sizes", "flips"), [([], 0.0), ([3, 0], 0.0), ([5], 1.5)])
def test_impossible_is_refused(sizes, flips):
    with pytest.raises(DataError, match="certifiable"):
        certifiable(sizes, 0.95, flips)
