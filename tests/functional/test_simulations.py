"""What the statistics promise, held by simulated runs: false alarms, coverage, bias, power. Every number is 1,000 runs.

A run is drawn, and then goes the way of a real one: `items.measure`'s p (exact McNemar, or sign-flip), `holm` over the
probes, the intervals of the report. Bounds are those promised (5 % tests reject in 3 to 7 %, 95 % intervals hold in 93
to 97 %), not wider ones; where an exact test on few discordant items must be rarer, the enumerated rate is the bound.
"""

import math
from functools import cache

import numpy as np
import pytest
from scipy import stats

from retain.functional import flip_shares, forgetting, statistics
from retain.functional.flip_shares import Outcomes

RUNS = 1000


def flipped(rng, items, lost, gained):
    """Numbers of items lost and gained in `RUNS` runs: (RUNS, 2)."""
    return rng.multinomial(items, [lost, gained, 1 - lost - gained], size=RUNS)[:, :2]


def pairs(table):
    """Rows as tuples, so that what depends on the two counts alone is worked out once for each pair."""
    return [tuple(map(int, row)) for row in table]


@cache
def _mcnemar(fewer, more, mid):
    return statistics.mcnemar(fewer, more, mid)


def mcnemar(lost, gained, mid=False):
    return _mcnemar(min(lost, gained), max(lost, gained), mid)


def rejected(table, **how):
    return np.array([mcnemar(*pair, **how) for pair in pairs(table)])


def exact_rate(items, discordant, alpha=0.05, **how):
    """Chance that McNemar's test rejects when nothing changed, by enumeration over the number of discordant items."""
    rate = 0.0
    for n, weight in enumerate(stats.binom.pmf(np.arange(items + 1), items, discordant)):
        if weight > 1e-12:
            lost = np.arange(n + 1)
            p = np.array([mcnemar(int(k), int(n - k), **how) for k in lost])
            rate += weight * stats.binom.pmf(lost, n, 0.5)[p < alpha].sum()
    return rate


@pytest.mark.parametrize(("items", "discordant"), [(1000, 0.3), (2000, 0.2)])
def test_mcnemar_on_many_discordant_items_rejects_at_its_level(items, discordant):
    """From some 300 discordant items on the exact test's own rate is above 4 %."""
    p = rejected(flipped(np.random.default_rng(1), items, discordant / 2, discordant / 2))
    assert 0.03 <= (p < 0.05).mean() <= 0.07


@pytest.mark.parametrize(("items", "discordant"), [(40, 0.1), (100, 0.1), (200, 0.1)])
def test_mcnemar_on_few_discordant_items_is_as_rare_as_enumerated(items, discordant):
    """Exact and discrete: never above 5 %, below 3 % with some 20 discordant items or fewer."""
    share = (rejected(flipped(np.random.default_rng(2), items, discordant / 2, discordant / 2)) < 0.05).mean()
    rate = exact_rate(items, discordant)
    assert rate <= 0.05
    assert abs(share - rate) <= 3.3 * math.sqrt(rate * (1 - rate) / RUNS)


@pytest.mark.parametrize(("items", "discordant"), [(200, 0.2), (400, 0.1), (1000, 0.2)])
def test_mid_p_rejects_at_its_level(items, discordant):
    p = rejected(flipped(np.random.default_rng(3), items, discordant / 2, discordant / 2), mid=True)
    assert 0.03 <= (p < 0.05).mean() <= 0.07


@pytest.mark.parametrize("kind", ["skewed", "few changed"])
def test_sign_flip_rejects_at_its_level(kind):
    """Scores that are not right or wrong. Skewed before and after from one law: differences are symmetric."""
    rng = np.random.default_rng(4)

    def run():
        if kind == "few changed":
            return rng.normal(0, 0.2, size=100) * (rng.random(100) < 0.3)
        return rng.exponential(size=40) - rng.exponential(size=40)

    share = np.mean([statistics.sign_flip(run(), resamples=199, seed=i) <= 0.05 for i in range(RUNS)])
    assert 0.03 <= share <= 0.07


@pytest.mark.parametrize("shared", [False, True])
def test_holm_over_probes_keeps_the_family(shared):
    """Probes of different sizes; `shared`: the same items fall the same way in all, and one more probe by sign-flip."""
    rng = np.random.default_rng(5)
    sizes, discordant = [100, 150, 200, 250, 300, 400], [0.3, 0.2, 0.15, 0.12, 0.1, 0.08]
    alarms = 0
    for run in range(RUNS):
        coins = rng.random(max(sizes))
        p = []
        for n, psi in zip(sizes, discordant):
            falls = coins[:n] if shared else rng.random(n)
            moved = rng.random(n) < psi
            p.append(mcnemar(int((moved & (falls < 0.5)).sum()), int((moved & (falls >= 0.5)).sum())))
        falls = coins[:50] if shared else rng.random(50)
        p.append(statistics.sign_flip(np.where(falls < 0.5, -1, 1) * rng.random(50), resamples=399, seed=run))
        alarms += statistics.holm(p).min() < 0.05
    assert alarms / RUNS <= 0.07


def held(intervals, truth):
    return np.mean([i.low <= truth <= i.high for i in intervals])


@pytest.mark.parametrize(
    ("items", "lost", "gained"),
    [(40, 0.15, 0.1), (100, 0.1, 0.05), (200, 0.12, 0.04), (431, 0.06, 0.06), (1000, 0.1, 0)],
)
def test_paired_intervals_of_flips_hold_the_truth(items, lost, gained):

    @cache
    def interval(lost, gained):
        difference = np.repeat([-1, 1, 0], [lost, gained, items - lost - gained])
        return statistics.paired_interval(np.zeros(items), difference, resamples=2000)

    found = [interval(*pair) for pair in pairs(flipped(np.random.default_rng(6), items, lost, gained))]
    assert 0.93 <= held(found, gained - lost) <= 0.97


@pytest.mark.parametrize("items", [40, 200])
def test_paired_intervals_of_other_scores_hold_the_truth(items):
    """Between 0 and 1, a third of them changed, rises and falls of unequal size: skewed, and mostly zero."""
    rng = np.random.default_rng(7)
    scale = 0.1 * rng.exponential(size=(RUNS, items)) * rng.choice([-2, 1, 0], p=[0.2, 0.15, 0.65], size=(RUNS, items))
    difference = np.clip(scale, -1, 1)
    # of an exponential e: mean of min(c·e, 1) is c·(1 − exp(−1/c))
    truth = -0.2 * 0.2 * (1 - math.exp(-5)) + 0.15 * 0.1 * (1 - math.exp(-10))
    found = [statistics.paired_interval(np.zeros(items), d, resamples=400, seed=i) for i, d in enumerate(difference)]
    assert 0.93 <= held(found, truth) <= 0.97


@pytest.mark.parametrize("texts", [30])
def test_intervals_of_nats_per_token_hold_the_truth(texts):
    """Long texts weigh more and rise more, so the mean per token is not the mean per text."""
    rng = np.random.default_rng(8)
    tokens = rng.integers(20, 200, size=(RUNS, texts))
    rise = 0.05 + 0.0005 * tokens + 0.05 * rng.normal(size=tokens.shape)
    all_tokens = np.arange(20, 200)
    truth = np.average(0.05 + 0.0005 * all_tokens, weights=all_tokens)
    found = [
        statistics.paired_interval(np.zeros(texts), r, weights=t, resamples=500, seed=i)
        for i, (r, t) in enumerate(zip(rise, tokens))
    ]
    assert 0.93 <= held(found, truth) <= 0.97


@pytest.mark.parametrize(("items", "right"), [(40, 0.5), (100, 0.7), (431, 0.9)])
def test_intervals_of_one_score_hold_the_truth(items, right):
    rng = np.random.default_rng(9)
    counts, times = np.unique(rng.binomial(items, right, size=RUNS), return_counts=True)
    found = [statistics.mean_interval(np.repeat([1, 0], [k, items - k])) for k in counts]
    inside = np.array([i.low <= right <= i.high for i in found])
    assert 0.93 <= (inside * times).sum() / RUNS <= 0.97


def test_macro_intervals_hold_the_truth():
    rng = np.random.default_rng(10)
    sizes, lost, gained = (40, 100, 250), (0.2, 0.1, 0.05), (0.05, 0.1, 0.02)
    tables = [flipped(rng, n, a, b) for n, a, b in zip(sizes, lost, gained)]

    def interval(run):
        probes = [np.repeat([-1, 1, 0], [*t[run], n - t[run].sum()]) for n, t in zip(sizes, tables)]
        return statistics.macro_interval(probes, resamples=1000, seed=run)

    assert 0.93 <= held(map(interval, range(RUNS)), np.mean(gained) - np.mean(lost)) <= 0.97


# Know or guess: what is known is right, the rest is guessed afresh among k options.


def expected(known, lost, gained, k):
    """(F_raw, F_adj without its cut at 0, lost) of unlimited items, by hand."""
    before, after = known + (1 - known) / k, known - lost + gained + (1 - known + lost - gained) / k
    never = 1 - known - gained  # unknown before and after
    raw = lost * (1 - 1 / k) + never * (1 / k) * (1 - 1 / k)
    return raw, raw - (1 - before) * (1 - after) / (k - 1), lost


def know_or_guess(rng, items, known, lost, gained, k):
    """Right before and after, (RUNS, items) each; items are drawn anew in every run."""
    place = rng.random((RUNS, items))
    before, after = place < known, (place < known - lost) | (place >= 1 - gained)
    return before | (rng.random((RUNS, items)) < 1 / k), after | (rng.random((RUNS, items)) < 1 / k)


@pytest.mark.parametrize(
    ("k", "known", "lost", "gained", "raw", "adjusted"),
    [
        (4, 0.5, 0, 0, 0.093, 0.047),  # the table of the reference: k = 4
        (4, 0.5, 0.1, 0, 0.168, 0.112),
        (4, 0.4, 0.05, 0.08, 0.135, 0.071),
        (4, 0.2, 0.02, 0, 0.164, 0.041),
        (2, 0.6, 0.02, 0.02, None, None),
        (5, 0.3, 0, 0.1, None, None),
    ],
)
def test_bias_of_the_shares_of_items_lost(k, known, lost, gained, raw, adjusted):
    """F_raw counts guesses as losses, F_adj takes away too little of them, F_pair is right on average at 200 items."""
    truth = expected(known, lost, gained, k)
    if raw is not None:
        # the table was simulated once, with 200 000 items: standard error below 0.0009
        assert truth[:2] == pytest.approx((raw, adjusted), abs=0.002)
    before, after = know_or_guess(np.random.default_rng(11), 200, known, lost, gained, k)
    found = np.array([forgetting.sample_forgetting(b, a, k)[:3] for b, a in zip(before, after)])
    mean, error = found.mean(0), found.std(0) / math.sqrt(RUNS)
    for place in (0, 2):
        assert abs(mean[place] - truth[place]) <= 3.3 * error[place]
    # Adjusted is cut at 0 and has a product of two means of the same items: at 200 items at most 0.01 off its limit.
    assert abs(mean[1] - truth[1]) <= 0.01
    assert truth[0] > truth[2] + 0.01, "raw is too high"
    assert truth[1] > truth[2] + 0.01, "adjusted is too high"
    assert truth[1] < truth[0]


@pytest.mark.parametrize(("items", "known", "lost"), [(300, 0.5, 0.1)])
def test_intervals_of_the_shares_hold_what_they_estimate(items, known, lost, monkeypatch):
    bootstrap = statistics.bootstrap
    monkeypatch.setattr(statistics, "bootstrap", lambda *a, **k: bootstrap(*a, **{"resamples": 600} | k))
    before, after = know_or_guess(np.random.default_rng(12), items, known, lost, 0.02, 4)
    truth = expected(known, lost, 0.02, 4)
    found = [flip_shares.lost_shares([Outcomes(b, a, 4)], seed=i) for i, (b, a) in enumerate(zip(before, after))]
    for place, name in enumerate(flip_shares.ShareIntervals._fields):
        assert 0.93 <= held([shares[place] for shares in found], truth[place]) <= 0.97, name


@pytest.mark.parametrize(("items", "discordant"), [(300, 0.3), (1000, 0.1), (2000, 0.05)])
def test_a_change_of_the_detectable_size_is_found_four_times_in_five(items, discordant):
    """The formula is the normal one: the exact test is a little weaker, mid-p is on it."""
    size = statistics.detectable_difference(discordant, items)
    table = flipped(np.random.default_rng(13), items, (discordant + size) / 2, (discordant - size) / 2)
    exact, mid = ((rejected(table, mid=mid) < 0.05).mean() for mid in (False, True))
    assert 0.75 <= exact <= 0.85
    assert 0.77 <= mid <= 0.85


def test_detectable_over_probes_is_found_at_the_level_that_holm_asks():
    """One of eight probes changed, by what is detectable at α/8."""
    rng = np.random.default_rng(14)
    items, discordant, probes = 1000, 0.2, 8
    size = statistics.detectable_difference(discordant, items, 1 - 0.05 / probes)
    p = [rejected(flipped(rng, items, (discordant + size) / 2, (discordant - size) / 2))]
    p += [rejected(flipped(rng, 600, 0.025, 0.025)) for _ in range(probes - 1)]
    adjusted = np.array([statistics.holm(row) for row in np.transpose(p)])
    assert 0.75 <= (adjusted[:, 0] < 0.05).mean() <= 0.85
    assert (adjusted[:, 1:].min(1) < 0.05).mean() <= 0.07
