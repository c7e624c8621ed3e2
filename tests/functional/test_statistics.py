"""Intervals and tests against SciPy, exact enumeration, plain loops, and their own promised coverage."""

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from retain.errors import DataError
from retain.functional import statistics


def coverage(sample, interval, truth, trials=400):
    """Share of simulated data sets whose interval contains the truth."""
    found = [interval(sample()) for _ in range(trials)]
    return np.mean([low <= truth <= high for _, low, high in found])


def test_wilson_closed_form():
    k, n, z = 7, 9, stats.norm.ppf(0.975)
    p = k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    found = statistics.mean_interval([1] * k + [0] * (n - k))
    assert found == pytest.approx((p, centre - half, centre + half))


def test_all_right_still_has_an_interval():
    assert statistics.mean_interval(np.ones(20)).low == pytest.approx(1 / (1 + 1.959964**2 / 20))


def test_bca_is_scipys_at_the_widened_confidence():
    values = np.random.default_rng(0).exponential(size=40)
    z = stats.t.ppf(0.975, 39) * math.sqrt(40 / 39)
    reference = stats.bootstrap(
        (values,), np.mean, confidence_level=2 * stats.norm.cdf(z) - 1, n_resamples=40_000, rng=np.random.default_rng(1)
    ).confidence_interval
    found = statistics.mean_interval(values, resamples=40_000)
    assert found[1:] == pytest.approx(tuple(reference), abs=0.015)
    assert found.high - found.value > 1.2 * (found.value - found.low)  # the skew of the data is seen


def test_weighted_mean_is_a_ratio_of_sums_resampled_together():
    rng = np.random.default_rng(2)
    tokens, nll = rng.integers(10, 500, 60), rng.normal(3, 0.5, 60)
    found = statistics.mean_interval(nll, weights=tokens, resamples=20_000)
    slow = [np.average(nll[i], weights=tokens[i]) for i in rng.integers(60, size=(20_000, 60))]
    assert found.value == pytest.approx(np.average(nll, weights=tokens))
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.std(slow), rel=0.08)


def test_clusters_of_copies_count_once():
    values = np.random.default_rng(3).normal(size=50)
    copied, labels = np.repeat(values, 8), np.repeat(np.arange(50), 8)
    once = statistics.mean_interval(values)
    assert statistics.mean_interval(copied, clusters=labels) == pytest.approx(once, abs=1e-9)
    fooled = statistics.mean_interval(copied)
    assert (fooled.high - fooled.low) < 0.5 * (once.high - once.low)


def test_pairing_beats_two_separate_samples():
    """ψ = 0.05 at accuracy 0.7, n = 1000: a paired error of 0.71 points against 2.05 unpaired."""
    before = np.repeat([1, 1, 0, 0], [675, 25, 25, 275])
    after = np.repeat([1, 0, 1, 0], [675, 25, 25, 275])
    found = statistics.paired_interval(before, after)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(0.0071, rel=0.06)


def test_no_flip_on_few_items_is_not_certainty():
    found = statistics.paired_interval(np.ones(20), np.ones(20))
    assert found.value == 0
    assert found.low < -0.08
    assert found.high > 0.08
    same = np.linspace(0.1, 0.9, 20)  # continuous scores of which none changed: the same care
    assert statistics.paired_interval(same, same).low < -0.08
    many = statistics.paired_interval(np.ones(2000), np.ones(2000))
    assert many.low > -0.002


def test_right_or_wrong_interval_matches_bonett_price():
    lost, gained, n = 30, 12, 300
    difference = np.repeat([-1, 1, 0], [lost, gained, n - lost - gained])
    a, b = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.96 * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    found = statistics.paired_interval(np.zeros(n), difference, resamples=40_000)
    assert found[1:] == pytest.approx((b - a - half, b - a + half), abs=0.004)


@pytest.mark.parametrize(
    ("name", "draw", "truth", "n"),
    [
        ("flips", lambda r, n: r.choice([-1, 0, 1], size=n, p=[0.1, 0.86, 0.04]), -0.06, 200),
        ("many flips", lambda r, n: r.choice([-1, 0, 1], size=n, p=[0.3, 0.6, 0.1]), -0.2, 60),
        ("normal", lambda r, n: r.normal(0.3, 1, size=n), 0.3, 25),
        ("skewed", lambda r, n: r.exponential(size=n), 1.0, 120),
    ],
)
def test_coverage_of_paired_intervals(name, draw, truth, n):
    rng = np.random.default_rng(4)
    share = coverage(lambda: draw(rng, n), lambda d: statistics.paired_interval(0 * d, d, resamples=1000), truth)
    assert 0.92 <= share <= 0.98, name


def test_coverage_of_the_macro_mean():
    rng = np.random.default_rng(5)
    sizes, losses = (40, 80, 200), (0.05, 0.15, 0.1)
    share = coverage(
        lambda: [-(rng.random(n) < p).astype(float) for n, p in zip(sizes, losses)],
        lambda probes: statistics.macro_interval(probes, resamples=1000),
        -np.mean(losses),
    )
    assert 0.92 <= share <= 0.98


def test_macro_mean_weighs_probes_not_items():
    found = statistics.macro_interval([np.full(1000, 0.5), np.linspace(-0.4, 0.2, 10)])
    assert found.value == pytest.approx((0.5 - 0.1) / 2)
    alone = statistics.macro_interval([np.linspace(-1, 1, 50)])
    assert alone == statistics.paired_interval(np.zeros(50), np.linspace(-1, 1, 50))


def test_coverage_over_seeds():
    """Three runs: a new training run moves the score, and the interval has to know."""
    rng = np.random.default_rng(6)

    def runs():
        return 0.2 * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=80) + 0.3 * rng.normal(size=(3, 80))

    both = coverage(runs, lambda d: statistics.two_level_interval(d, resamples=500), 0, 300)
    items_only = coverage(runs, lambda d: statistics.paired_interval(0 * d[0], d.mean(0), resamples=500), 0, 300)
    assert 0.92 <= both <= 0.99
    assert items_only < 0.6


def test_two_levels_without_seed_noise_is_about_the_item_interval():
    d = np.tile(np.random.default_rng(7).normal(size=100), (4, 1))
    two, one = statistics.two_level_interval(d), statistics.paired_interval(0 * d[0], d[0])
    assert two.value == pytest.approx(one.value)
    assert two.high - two.low == pytest.approx(one.high - one.low, rel=0.05)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (4, 0), (5, 0), (6, 0), (3, 9), (7, 7), (20, 5)])
def test_mcnemar_by_enumeration(lost, gained):
    n, fewest = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, i) for i in range(fewest + 1)) / 2**n
    assert statistics.mcnemar(lost, gained) == pytest.approx(min(1, 2 * tail))
    if lost != gained:
        assert statistics.mcnemar(lost, gained, mid=True) == pytest.approx(2 * tail - math.comb(n, fewest) / 2**n)


def test_fewer_than_six_flips_never_reach_significance():
    assert [statistics.mcnemar(n, 0) for n in (4, 5, 6)] == [0.125, 0.0625, 0.03125]


def test_sign_flip_is_exact_for_few_items():
    d = np.array([0.3, -0.1, 0.7, 0.2, 0.05, -0.02, 0.4])
    sums = [abs(np.dot(signs, d)) for signs in itertools.product([1, -1], repeat=len(d))]
    expected = np.mean(np.array(sums) >= abs(d.sum()) - 1e-12)
    assert statistics.sign_flip(np.append(d, np.zeros(50))) == pytest.approx(expected)
    assert statistics.sign_flip(np.zeros(9)) == 1


def test_sign_flip_of_many_items_agrees_with_the_t_test_and_keeps_its_level():
    rng = np.random.default_rng(8)
    d = rng.normal(0.12, 1, size=300)
    assert statistics.sign_flip(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)
    false = np.mean([statistics.sign_flip(rng.normal(size=30), resamples=400) < 0.05 for _ in range(400)])
    assert 0.02 <= false <= 0.08


def test_holm_against_a_loop():
    rng = np.random.default_rng(9)
    for _ in range(20):
        p = rng.random(7) ** 3
        expected = np.empty(7)
        for i in range(7):
            smaller = sorted(q for q in p if q <= p[i])
            expected[i] = max(min(1, (7 - j) * q) for j, q in enumerate(smaller))
        assert statistics.holm(p) == pytest.approx(expected)
    assert list(statistics.holm([0.03])) == [0.03]
    assert len(statistics.holm([])) == 0


@pytest.mark.parametrize(("psi", "one", "two"), [(0.02, 1240, 1570), (0.05, 3090, 3920), (0.2, 12370, 15700)])
def test_sample_sizes(psi, one, two):
    assert statistics.items_needed(psi, 0.01, sides=1) == pytest.approx(one, abs=5.1)
    assert statistics.items_needed(psi, 0.01, sides=2) == pytest.approx(two, abs=5.1)
    needed = statistics.items_needed(psi, 0.013)
    assert statistics.detectable_difference(psi, needed) <= 0.013
    assert statistics.detectable_difference(psi, needed - 1) > 0.013


def test_detectable_difference_is_detected_four_times_in_five():
    rng = np.random.default_rng(10)
    size = statistics.detectable_difference(0.1, 1000)
    table = rng.multinomial(1000, [(0.1 + size) / 2, (0.1 - size) / 2, 0.9], size=800)
    share = np.mean([statistics.mcnemar(lost, gained) < 0.05 for lost, gained, _ in table])
    assert share == pytest.approx(0.8, abs=0.06)


def test_three_outcomes():
    assert statistics.judge(-0.01, 0.02, 0.02) == "kept"
    assert statistics.judge(0.021, 0.05, 0.02) == "lost"
    assert statistics.judge(0.0, 0.05, 0.02) == "cannot tell"


def test_same_seed_same_interval():
    values = np.random.default_rng(11).random(50)
    assert statistics.mean_interval(values, seed=3) == statistics.mean_interval(values, seed=3)
    assert statistics.mean_interval(values, seed=3) != statistics.mean_interval(values, seed=4)


def test_memory_chunks_do_not_change_the_distribution(monkeypatch):
    values = np.random.default_rng(12).random(300)
    whole = statistics.mean_interval(values)
    monkeypatch.setattr(statistics, "_CELLS_IN_MEMORY", 1000)
    assert statistics.mean_interval(values) == whole


def test_fast_enough():
    values = np.random.default_rng(13).random(400)
    start = time.perf_counter()
    statistics.paired_interval(values, values[::-1])
    statistics.sign_flip(values - values[::-1])
    assert time.perf_counter() - start < 3  # a tenth of it on an idle core; room for a busy machine


@pytest.mark.parametrize(
    "call",
    [
        lambda: statistics.mean_interval([]),
        lambda: statistics.mean_interval([0.5]),
        lambda: statistics.mean_interval([0.5, math.nan]),
        lambda: statistics.mean_interval([0.5, 0.1], weights=[1]),
        lambda: statistics.mean_interval([0.5, 0.1], weights=[1, -1]),
        lambda: statistics.mean_interval([0.5, 0.1], clusters=[1]),
        lambda: statistics.paired_interval([0.5, 0.1], [0.5]),
        lambda: statistics.macro_interval([]),
        lambda: statistics.two_level_interval([[1.0, 2.0]]),
        lambda: statistics.holm([1.2]),
        lambda: statistics.items_needed(0.1, 0),
    ],
)
def test_bad_input_is_one_line(call):
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
