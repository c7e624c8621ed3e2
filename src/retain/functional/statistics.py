"""Error bars and tests for scores of one model, and for two models on the same items.

Notation: `d` = after − before on one item, n items; n10 items went right → wrong, n01 wrong → right.
Everything random takes a `seed` and gives the same numbers for the same seed. An item is resampled with its
score before *and* its score after: the two are strongly correlated, and resampling them apart gives intervals
several times too wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from retain.errors import DataError

RESAMPLES = 10_000
_CELLS_IN_MEMORY = 2_000_000
_FEW_CHANGED = 10

Sums = list[NDArray[np.float64]]


class Interval(NamedTuple):
    """A number and the ends of its interval, in the unit of the number."""

    value: float
    low: float
    high: float


def mean_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of item scores with its interval.

    0/1 scores without weights and clusters: Wilson's score interval (Wilson 1927). Anything else: BCa
    bootstrap over items, or over clusters where they are given.

    Args:
        values: (n,) scores.
        weights: (n,) non-negative, for a weighted mean Σwv/Σw (tokens for perplexity).
        clusters: (n,) labels; items of a cluster (same document, same passage) are resampled together.

    Raises:
        DataError: no values, values that are not finite, shapes that differ, or fewer than two units to
            resample (one document says nothing about other documents).
    """
    values = _vector(values, "values")
    if weights is None and clusters is None and _is_binary(values):
        proportion = stats.binomtest(int(values.sum()), len(values)).proportion_ci(confidence, method="wilson")
        return Interval(float(values.mean()), float(proportion.low), float(proportion.high))
    return bootstrap([unit_sums(values, weights, clusters)], _ratio, confidence, resamples, seed)


def paired_interval(
    before: ArrayLike,
    after: ArrayLike,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of after − before on the same items, with a paired bootstrap interval.

    A plain bootstrap is blind to what did not happen: no flip on 20 items gives [0, 0], although one item in
    eight may flip in truth. For right/wrong scores (and unweighted scores of which fewer than ten changed by
    at most 1) one lost and one gained item are therefore added before resampling, which is the bootstrap form
    of the adjusted interval of Bonett & Price (2012, J. Educ. Behav. Stat. 37:479). Otherwise BCa,
    no end nearer than that of Student's t: where a third of a few dozen items changed, the skew that BCa corrects for
    is mostly noise, and BCa alone held the truth 90 to 93 times in 100 in simulated runs.

    Args and errors: as `mean_interval`; `before` and `after` are (n,) in the same order of items.
    """
    difference = _vector(after, "after") - _same(before, after, "before")
    return macro_interval([difference], confidence, [weights], [clusters], resamples, seed)


def macro_interval(
    differences: Sequence[ArrayLike],
    confidence: float = 0.95,
    weights: Sequence[ArrayLike | None] | None = None,
    clusters: Sequence[ArrayLike | None] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Unweighted mean over K probes of each probe's mean difference; items are resampled within each probe.

    Args:
        differences: K arrays (n_k,) of after − before.
        weights, clusters: K arrays or Nones, as in `mean_interval`.

    Raises:
        DataError: as `mean_interval`; or K = 0.
    """
    if not len(differences):
        raise DataError("macro_interval: no probes given. Give the differences of at least one probe.")
    weights = weights or [None] * len(differences)
    clusters = clusters or [None] * len(differences)
    plain, padded = [], []
    for d, w, c in zip(differences, weights, clusters, strict=True):
        d = _vector(d, "differences")
        plain.append(unit_sums(d, w, c))
        size = 1 / math.sqrt(len(differences)) if needs_padding(d, w) else 0.0
        padded.append(pad(plain[-1], [size]) if size else plain[-1])
    value = float(_macro([units.sum(0) for units in plain]))
    smoothed = any(len(a) != len(b) for a, b in zip(plain, padded))
    found = bootstrap(padded, _macro, confidence, resamples, seed, value, bca=not smoothed)
    if smoothed or len(plain) > 1:
        return found
    half = _student_half(plain[0], value, confidence)
    return Interval(value, min(found.low, value - half), max(found.high, value + half))


def two_level_interval(
    differences: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean difference over training seeds *and* items: what to expect from the next training run.

    Seeds and items are both resampled, and a draw uses the same items for every seed, because the seeds
    answered the same questions (Owen 2007, Ann. Appl. Stat. 1:386). A bootstrap of S seeds is too narrow by
    √((S−1)/S) and by the ratio of Student's t to the normal; the seeds' deviations are stretched by both, so
    that three seeds are about as wide as a t interval.

    Args:
        differences: (S, n), after − before of S runs on the same n items.

    Raises:
        DataError: not two-dimensional, not finite, fewer than 2 seeds or 2 items.
    """
    table = np.asarray(differences, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise DataError(
            f"two_level_interval: differences have shape {table.shape}. Give finite numbers (seeds, items), "
            "at least 2 of each; one seed says nothing about the next run."
        )
    runs, items = table.shape
    value = float(table.mean())
    tail = (1 - confidence) / 2
    stretch = _widened(tail, runs) / stats.norm.ppf(tail)
    stretched = table + (stretch - 1) * (table.mean(1, keepdims=True) - value)
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for part in _chunks(resamples, items):
        size = part.stop - part.start
        run_counts = rng.multinomial(runs, np.full(runs, 1 / runs), size=size)
        picked = rng.integers(items, size=(size, items))
        draws[part] = np.take_along_axis(run_counts @ stretched, picked, axis=1).mean(1) / runs
    low, high = np.quantile(draws, stats.norm.cdf([z := _widened(tail, items), -z]))
    return Interval(value, float(low), float(high))


def bootstrap(
    strata: Sequence[NDArray[np.float64]],
    statistic: Callable[[Sums], NDArray[np.float64]],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    value: float | None = None,
    bca: bool = True,
) -> Interval:
    """Stratified bootstrap of any function of sums over units.

    BCa (Efron 1987, J. Am. Stat. Assoc. 82:171) for one stratum, percentile for several. The normal quantile
    in both is replaced by √(n/(n−1)) · t_{n−1} (Hesterberg 2015, Am. Stat. 69:371), without which intervals
    of a few dozen items are too narrow.

    Args:
        strata: K arrays (n_k, q_k); row = a unit that is resampled as a whole, columns = what is summed.
        statistic: takes K arrays (..., q_k) of sums and returns (...).
        value: the number to report, where it is not the statistic of `strata` (padded units).
        bca: False asks for the percentile interval with one stratum too.

    Raises:
        DataError: fewer than two units in a stratum.
    """
    for units in strata:
        if len(units) < 2:
            raise DataError(
                f"bootstrap: {len(units)} unit to resample; an interval needs at least 2. "
                "Add items or split long documents."
            )
    rng = np.random.default_rng(seed)
    observed = float(statistic([units.sum(0) for units in strata]))
    draws = statistic([_resampled_sums(units, resamples, rng) for units in strata])
    z = _widened((1 - confidence) / 2, sum(map(len, strata)))
    ends = np.array([z, -z])
    if bca and len(strata) == 1:
        ends = _bca(ends, draws, observed, statistic([strata[0].sum(0) - strata[0]]))
    low, high = np.quantile(draws, stats.norm.cdf(ends))
    value = observed if value is None else value
    return Interval(value, min(float(low), value), max(float(high), value))


def unit_sums(
    values: ArrayLike, weights: ArrayLike | None = None, clusters: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Columns (Σ weight·value, Σ weight) per item, or per cluster: (n, 2) or (clusters, 2).

    Raises:
        DataError: shapes that differ, weights that are negative or all zero.
    """
    values = _vector(values, "values")
    weights = np.ones_like(values) if weights is None else _same(weights, values, "weights")
    if (weights < 0).any() or weights.sum() == 0:
        raise DataError("weights: negative or all zero. Give non-negative numbers with a positive sum.")
    columns = np.stack([weights * values, weights], axis=1)
    if clusters is None:
        return columns
    labels, where = np.unique(np.asarray(clusters), return_inverse=True)
    if where.shape != values.shape:
        raise DataError(f"clusters: shape {where.shape}, but there are {len(values)} items. Give one each.")
    sums = np.zeros((len(labels), 2))
    np.add.at(sums, where, columns)
    return sums


def needs_padding(differences: NDArray[np.float64], weights: ArrayLike | None = None) -> bool:
    """Whether a plain bootstrap of these differences would be blind to flips not seen (`paired_interval`)."""
    size = np.abs(differences)
    if weights is not None or (size > 1).any():
        return False
    return bool(np.isin(size, (0, 1)).all() or np.count_nonzero(size) < _FEW_CHANGED)


def pad(units: NDArray[np.float64], sizes: Sequence[float]) -> NDArray[np.float64]:
    """Add two units of average weight with values +sizes and −sizes; the last column is the weight."""
    weight = units[:, -1].mean()
    extra = np.array([[s * weight for s in sizes] + [weight], [-s * weight for s in sizes] + [weight]])
    return np.concatenate([units, extra])


def mcnemar(lost: int, gained: int, mid: bool = False) -> float:
    """Exact two-sided p that losses and gains are equally likely (McNemar 1947): n10 ~ Binomial(n10+n01, ½).

    Fewer than 6 flips can never give p < 0.05. `mid` gives the mid-p value, which subtracts P(X = min).
    """
    flipped = lost + gained
    if flipped == 0:
        return 1.0
    p = float(stats.binomtest(lost, flipped, 0.5).pvalue)
    return p - float(stats.binom.pmf(min(lost, gained), flipped, 0.5)) if mid else p


def sign_flip(differences: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p that the differences (n,) are symmetric around 0, by flipping their signs.

    Exact when 2^n ≤ `resamples`, n counting the differences that are not 0; otherwise Monte Carlo with
    p = (hits + 1)/(resamples + 1), which is never 0. Items of a cluster must be summed before.
    """
    moved = _vector(differences, "differences")
    moved = moved[moved != 0]  # the sign of a 0 changes nothing, and fewer items stay exact longer
    if not len(moved):
        return 1.0
    test = stats.permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CELLS_IN_MEMORY // len(moved)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm-adjusted p values (m,), in the order given (Holm 1979): p̃_(i) = max_{j≤i} min(1, (m−j+1)·p_(j)).

    Raises:
        DataError: a p value outside [0, 1].
    """
    p = np.asarray(p, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("holm: a p value is outside [0, 1]. Give probabilities.")
    order = np.argsort(p)
    steps = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def detectable_difference(
    variance: float, items: int, confidence: float = 0.95, power: float = 0.8, sides: Literal[1, 2] = 2
) -> float:
    """Smallest true difference found with the given power: (z_{1−α} + z_power)·√(variance/n).

    `variance` is that of the paired difference of one item; for right/wrong scores and small differences it
    is the share ψ = (n10 + n01)/n of items that flip. Two-sided tests use α/2.
    """
    return _quantiles(confidence, power, sides) * math.sqrt(variance / items)


def items_needed(
    variance: float, difference: float, confidence: float = 0.95, power: float = 0.8, sides: Literal[1, 2] = 2
) -> int:
    """Items with which a true `difference` is found with the given power; inverse of `detectable_difference`.

    Raises:
        DataError: a difference that is not positive.
    """
    if difference <= 0:
        raise DataError(f"items_needed: difference {difference} is not positive. Give the smallest that matters.")
    return math.ceil(_quantiles(confidence, power, sides) ** 2 * variance / difference**2)


def judge(low: float, high: float, budget: float) -> Literal["kept", "lost", "cannot tell"]:
    """Three-outcome non-inferiority of an interval of *forgetting* (positive = lost) against a budget.

    "kept" if all of the interval is within the budget, "lost" if all of it is beyond, otherwise "cannot
    tell". For one-sided 95 % statements give the two-sided 90 % interval.
    """
    if high <= budget:
        return "kept"
    return "lost" if low > budget else "cannot tell"


def _resampled_sums(units: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Column sums (resamples, q) of n units drawn with replacement from the n given."""
    count, columns = units.shape
    distinct, repeats = np.unique(units, axis=0, return_counts=True)
    if len(distinct) <= max(8, count // 16):  # right/wrong scores: counting kinds is far cheaper than drawing items
        return rng.multinomial(count, repeats / count, size=resamples) @ distinct
    sums = np.empty((resamples, columns))
    for part in _chunks(resamples, count):
        picked = rng.integers(count, size=(part.stop - part.start, count))
        for column in range(columns):
            sums[part, column] = np.take(units[:, column], picked).sum(axis=1)
    return sums


def _bca(
    ends: NDArray[np.float64], draws: NDArray[np.float64], observed: float, left_out: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Normal quantiles corrected for bias z0 and acceleration a; unchanged where these are undefined."""
    below = ((draws < observed).mean() + (draws <= observed).mean()) / 2
    influence = left_out.mean() - left_out
    spread = (influence**2).sum()
    if not 0 < below < 1 or spread == 0:
        return ends
    bias, acceleration = stats.norm.ppf(below), (influence**3).sum() / (6 * spread**1.5)
    shifted = bias + ends
    scale = 1 - acceleration * shifted
    return bias + shifted / scale if (scale > 0).all() else ends


def _ratio(sums: Sums) -> NDArray[np.float64]:
    return sums[0][..., 0] / sums[0][..., 1]


def _macro(sums: Sums) -> NDArray[np.float64]:
    return np.mean([s[..., 0] / s[..., 1] for s in sums], axis=0)


def _student_half(units: NDArray[np.float64], value: float, confidence: float) -> float:
    """Half of Student's t interval of a ratio of sums, linearised; Σwv and Σw per unit (n, 2)."""
    count = len(units)
    residual = (units[:, 0] - value * units[:, 1]) / units[:, 1].mean()
    return float(stats.t.ppf((1 + confidence) / 2, count - 1) * math.sqrt((residual**2).sum() / (count - 1) / count))


def _widened(tail: float, units: int) -> float:
    return float(stats.t.ppf(tail, units - 1) * math.sqrt(units / (units - 1)))


def _quantiles(confidence: float, power: float, sides: int) -> float:
    return float(stats.norm.ppf(1 - (1 - confidence) / sides) + stats.norm.ppf(power))


def _chunks(total: int, width: int) -> list[slice]:
    step = max(1, _CELLS_IN_MEMORY // width)
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _is_binary(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise DataError(f"{name}: shape {array.shape}. Give a non-empty row of finite numbers, one per item.")
    return array


def _same(values: ArrayLike, other: ArrayLike, name: str) -> NDArray[np.float64]:
    array, length = _vector(values, name), len(np.asarray(other))
    if len(array) != length:
        raise DataError(f"{name}: {len(array)} numbers against {length}. Give one per item, in the same order.")
    return array
