"""Several sources of replay: shares, temperature, and rows in random passes over each."""

import math

import numpy as np
import pytest
from scipy import stats

from retain.errors import ConfigError
from retain.functional.sampling import mix, schedule
from retain.functional.sources import Sources, draws, odds, shares


def made(sizes, weights=None, temperature=1.0):
    """Sources whose rows are not in order of source."""
    origin = np.random.default_rng(9).permutation(np.repeat(np.arange(len(sizes)), sizes))
    names = tuple("abcdef"[: len(sizes)])
    return Sources(names, origin, tuple(weights or [1.0] * len(sizes)), temperature)


def test_temperature_one_is_by_size_and_a_high_one_is_even():
    sizes = [10, 1000, 200]
    assert shares(sizes, [1, 1, 1], 1.0) == pytest.approx(np.array(sizes) / 1210)
    assert shares(sizes, [1, 1, 1], 1e9) == pytest.approx([1 / 3] * 3)
    assert shares(sizes, [1, 1, 1], math.inf) == pytest.approx([1 / 3] * 3)
    assert shares(sizes, [2, 1, 1], math.inf) == pytest.approx([0.5, 0.25, 0.25])
    assert shares([4, 16], [1, 1], 2) == pytest.approx([1 / 3, 2 / 3])
    assert shares([4, 16], [3, 1], 2) == pytest.approx([0.6, 0.4])
    small = [shares(sizes, [1, 1, 1], t)[0] for t in (1, 2, 5, 20)]
    assert small == sorted(small)
    assert shares([1e300, 1e-300], [1, 1], 0.1) == pytest.approx([1, 0])


def test_shares_errors():
    for sizes, weights, temperature in (([0, 1], [1, 1], 1), ([1], [0], 1), ([1, 2], [1], 1), ([1, 2], [1, 1], 0)):
        with pytest.raises(ConfigError, match=r"replay\.sources"):
            shares(sizes, weights, temperature)


@pytest.mark.parametrize("temperature", [1.0, 3.0, math.inf])
def test_each_source_gives_its_share_at_every_moment(temperature):
    sources = made([40, 7, 3], [1, 2, 1], temperature)
    p = sources.shares(np.ones(50))
    given = sources.origin[draws(np.ones(50), 400, 1, sources)]
    for number in range(1, 401):
        assert np.abs(np.bincount(given[:number], minlength=3) - number * p).max() < 2


def test_expected_mixture_by_source_and_by_row():
    """Counted, not drawn by chance: closer than a fair draw would be, and not always in the same order."""
    sizes = [30, 10, 5]
    sources = made(sizes, [1, 1, 2], math.inf)
    counts = np.zeros(45)
    for seed in range(200):
        counts += np.bincount(draws(np.ones(45), 36, seed, sources)[:36], minlength=45)
    by_source = np.bincount(sources.origin, counts)
    expected = 200 * 36 * np.array([0.25, 0.25, 0.5])
    assert stats.chisquare(by_source, expected).pvalue > 0.05
    for number, size in enumerate(sizes):  # rows of a source are alike: no more unequal than by chance
        mine = counts[sources.origin == number]
        assert ((mine - mine.mean()) ** 2 / mine.mean()).sum() < stats.chi2.ppf(0.999, size - 1)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_no_row_twice_within_a_pass_of_its_source(by_tokens):
    sources = made([12, 5], [1, 1], math.inf)
    weight = np.random.default_rng(3).integers(1, 40, 17).astype(float) if by_tokens else np.ones(17)
    drawn = draws(weight, 60 * weight.mean(), 2, sources)
    for number, size in enumerate((12, 5)):
        mine = [row for row in drawn.tolist() if sources.origin[row] == number]
        passes = [mine[i : i + size] for i in range(0, len(mine), size)]
        assert len(passes) > 2
        assert all(len(set(p)) == len(p) for p in passes)
        assert passes[0] != passes[1]


def test_tokens_are_shared_by_tokens_and_the_first_draws_stay():
    sources = made([30, 30])
    weight = np.where(sources.origin == 0, 5.0, 50.0)
    drawn = draws(weight, 6000, 0, Sources(("a", "b"), sources.origin, (1, 1), math.inf))
    given = np.bincount(sources.origin[drawn], weight[drawn])
    assert given[0] / given.sum() == pytest.approx(0.5, abs=0.02)
    by_size = draws(weight, 6000, 0, sources)  # T = 1: each row alike, also where tokens are counted
    assert np.bincount(sources.origin[by_size]) / len(by_size) == pytest.approx([0.5, 0.5], abs=0.03)
    longer = draws(weight, 60_000, 0, sources)
    certain = int(np.searchsorted(np.cumsum(weight[by_size]), 6000))
    assert longer[:certain].tolist() == by_size[:certain].tolist()


def test_odds_are_those_of_the_rows_that_are_drawn():
    sources = made([30, 20], [1, 3], math.inf)
    weight = np.where(sources.origin == 0, 5.0, 50.0)
    drawn = draws(weight, 200_000, 0, sources)
    assert odds(np.full(10, 8.0), weight, sources) == pytest.approx(8 / weight[drawn].mean(), rel=1e-2)
    assert odds(np.full(10, 8.0), np.array([2.0, 6.0])) == 2
    assert odds(np.ones(3), np.ones(0)) == 1


def test_one_source_is_none():
    one = Sources(("old",), np.zeros(9, int), (2.0,), 5.0)
    for epoch in range(2):
        options = {"seed": 3, "epoch": epoch, "epochs": 2, "window": 8}
        plain = mix(np.ones(40), np.ones(9), schedule("constant", 0.3), **options)
        assert np.array_equal(mix(np.ones(40), np.ones(9), schedule("constant", 0.3), sources=one, **options), plain)


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_sources_do_not_change_how_much_is_replayed(by):
    sources = made([40, 7, 3], [1, 1, 1], math.inf)
    replay = np.random.default_rng(0).integers(1, 9, 50)
    seen = []
    for epoch in range(3):
        rows = mix(
            np.full(60, 4), replay, schedule("constant", 0.4), seed=5, epoch=epoch, epochs=3, by=by, sources=sources
        )
        seen += rows.tolist()
    old = np.array([row - 60 for row in seen if row >= 60])
    weight = replay[old].sum() / 4 if by == "tokens" else len(old)
    assert abs(weight - 180 * 0.4 / 0.6) <= 1.2
    given = np.bincount(sources.origin[old], replay[old] if by == "tokens" else None)
    assert given / given.sum() == pytest.approx([1 / 3] * 3, abs=0.03)
