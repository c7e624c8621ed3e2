"""Two-sample tests: against slow and foreign forms, and on vectors of which the truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from retain.errors import DataError
from retain.functional.two_samples import FEWEST, mmd, told_apart

REPEATS = 80


def draw(seed: int, m: int = 30, n: int = 40, width: int = 12, shift: float = 0.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width))
    return rng.normal(size=(m, width)) @ mixing, (rng.normal(size=(n, width)) + shift) @ mixing


def slow_mmd(x, y) -> float:
    both = [*x, *y]
    width = np.median([math.dist(a, b) for a, b in itertools.combinations(both, 2)])

    def kernel(rows, columns):
        return np.mean([math.exp(-(math.dist(a, b) ** 2) / (2 * width**2)) for a in rows for b in columns])

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def test_the_distance_is_that_of_the_definition():
    x, y = draw(0, 9, 11, 4, 0.5)
    assert mmd(x, y, 10).value == pytest.approx(slow_mmd(x, y), abs=1e-12)


def test_the_p_value_is_that_of_scipys_permutation_test():
    x, y = draw(1, 12, 14, 3, 0.4)
    places = np.arange(26.0)
    both = np.concatenate([x, y])
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    width = np.median(np.sqrt(squares[np.triu_indices(26, 1)]))
    kernel = np.exp(-squares / (2 * width**2))

    def statistic(a, b):
        a, b = a.astype(int), b.astype(int)
        return kernel[np.ix_(a, a)].mean() + kernel[np.ix_(b, b)].mean() - 2 * kernel[np.ix_(a, b)].mean()

    other = stats.permutation_test(
        (places[:12], places[12:]), statistic, n_resamples=1999, alternative="greater", rng=np.random.default_rng(0)
    )
    found = mmd(x, y, 1999)
    assert found.value == pytest.approx(other.statistic, abs=1e-12)
    assert found.p == pytest.approx(other.pvalue, abs=4 * math.sqrt(0.25 / 2000))


def test_the_classifier_is_scikit_learns_ridge():
    """Sets of one size: weighted labels are ±1, and the sign of the regression is `RidgeClassifier`'s answer."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = draw(2, 40, 40, 12, 0.3)
    z, truth = np.concatenate([x, y]), np.repeat([1, 0], 40)
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(z, np.zeros(80))
    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=12.0))
    named = cross_val_predict(model, z, truth, cv=list(folds))
    assert told_apart(x, y, 5).accuracy == pytest.approx(balanced_accuracy_score(truth, named))


@pytest.mark.parametrize("sizes", [(20, 20), (12, 60)], ids=["alike", "uneven"])
@pytest.mark.parametrize("test", [mmd, told_apart])
def test_one_distribution_gives_false_alarms_as_often_as_it_says(test, sizes):
    """p ≤ 0.05 in about 5 of 100: between the ends of the binomial's 99.9 % range."""
    alarms = sum(test(*draw(seed, *sizes, 6), permutations=99, seed=seed).p <= 0.05 for seed in range(REPEATS))
    low, high = stats.binom.interval(0.999, REPEATS, 0.05)
    assert low <= alarms <= high


@pytest.mark.parametrize("test", [mmd, told_apart])
def test_a_shift_is_found(test):
    found = [test(*draw(seed, shift=0.8), permutations=199).p for seed in range(10)]
    assert sum(p <= 0.05 for p in found) >= 9


def test_mmd_finds_what_no_line_can_tell():
    """A ring around the other set: same mean, other spread."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), 2.5 * rng.normal(size=(60, 3))
    assert mmd(x, y, 199).p <= 0.01
    assert 0.3 < told_apart(x, y, 199).accuracy < 0.65


def test_the_interval_of_the_accuracy_holds_it():
    x, y = draw(3, 50, 70, 8, 0.6)
    found = told_apart(x, y, 50)
    assert found.low < found.accuracy < found.high
    apart = told_apart(x, y + 100, 50)
    assert apart.accuracy == 1
    assert 0.9 < apart.low < 1


def test_the_same_seed_gives_the_same_p():
    x, y = draw(4)
    assert mmd(x, y, 50, seed=3) == mmd(x, y, 50, seed=3)
    assert told_apart(x, y, 50, seed=3) == told_apart(x, y, 50, seed=3)


def test_too_few_rows_and_other_widths_are_refused():
    x, y = draw(5)
    with pytest.raises(DataError, match=f"at least {FEWEST}"):
        mmd(x[:3], y)
    with pytest.raises(DataError, match="by one model"):
        told_apart(x, y[:, :5])
