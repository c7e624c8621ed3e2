"""Do two sets of vectors come from one distribution? Two tests whose p values hold at every size.

    MMD²(X, Y) = mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y)      (Gretton et al. 2012, JMLR 13:723, eq. 5, biased)
    accuracy   = share of rows whose set a classifier names     (Lopez-Paz & Oquab 2017, arXiv:1610.06545)

k(x, x′) = exp(−‖x − x′‖² / 2σ²), σ the median distance over all pairs. Both p values are by permutation: rows that are
exchangeable come from either set with equal chance, so p is exact whatever the statistic (Phipson & Smyth 2010, doi:
10.2202/1544-6115.1585: the observed order counts as one).
Deviations: the classifier is ridge regression on the labels, weighted so that sets of different size count alike, and
its accuracy is the mean over both sets; a cross-validated binomial p, as if the folds were independent, is too small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retain.errors import DataError

PERMUTATIONS = 999
FOLDS = 5
#: Fewest rows of each set: below, no accuracy can be told from chance with any certainty.
FEWEST = 8


class MMD(NamedTuple):
    """The squared distance, its p value, and its median under permutation."""

    value: float
    p: float
    usual: float


class Told(NamedTuple):
    """Cross-validated accuracy, mean over both sets, with its 95 % interval, and its p value; 0.5 is chance."""

    accuracy: float
    low: float
    high: float
    p: float


def mmd(x: NDArray[Any], y: NDArray[Any], permutations: int = PERMUTATIONS, seed: int = 0) -> MMD:
    """Maximum mean discrepancy of vectors [m, H] and [n, H].

    Raises:
        DataError: fewer than `FEWEST` rows of either, or widths that differ.
    """
    from scipy.spatial.distance import pdist, squareform

    z = _joined(x, y)
    distances = pdist(z)
    width = float(np.median(distances)) or 1.0
    kernel = squareform(np.exp(-(distances**2) / (2 * width**2)))
    np.fill_diagonal(kernel, 1.0)
    weights = _orders(len(x), len(y), permutations, seed)
    weights = np.where(weights, 1 / len(x), -1 / len(y))  # [orders, N]
    values = np.einsum("pn,pn->p", weights @ kernel, weights)
    return MMD(float(values[0]), _p(values), float(np.median(values[1:])))


def told_apart(
    x: NDArray[Any],
    y: NDArray[Any],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    strength: float = 1.0,
) -> Told:
    """How well a linear classifier tells vectors [m, H] and [n, H] apart.

    Args:
        strength: of the ridge, times the number of directions that vary.

    Raises:
        DataError: fewer than `FEWEST` rows of either, or widths that differ.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z = _joined(x, y)
    first = _orders(len(x), len(y), permutations, seed)
    labels = np.where(first, len(z) / (2 * len(x)), -len(z) / (2 * len(y))).T  # [N, orders]
    varies = int((z.std(0) > 0).sum())
    model = make_pipeline(StandardScaler(), Ridge(alpha=max(1.0, strength * varies), solver="cholesky"))
    # folds are drawn once, blind to the order of labels, so that every order is treated alike
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(z, np.zeros(len(z)))
    scores = cross_val_predict(model, z, labels, cv=list(folds)).reshape(len(z), -1)
    right = (scores > 0) == (labels > 0)
    accuracies = 0.5 * (_mean(right, first.T) + _mean(right, ~first.T))
    accuracy = float(accuracies[0])
    low, high = _interval(right[: len(x), 0], right[len(x) :, 0])
    return Told(accuracy, low, high, _p(accuracies))


def _mean(right: NDArray[np.bool_], mine: NDArray[np.bool_]) -> NDArray[np.float64]:
    return (right & mine).sum(0) / mine.sum(0)


def _interval(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float]:
    """Of a mean of two shares: Agresti and Caffo 2000 (doi:10.1080/00031305.2000.10474560), one of each added twice."""
    shares = [(part.sum() + 1) / (len(part) + 2) for part in (first, second)]
    middle = 0.5 * sum(shares)
    spread = 0.5 * np.sqrt(sum(p * (1 - p) / (len(part) + 2) for p, part in zip(shares, (first, second))))
    return float(max(0.0, middle - 1.96 * spread)), float(min(1.0, middle + 1.96 * spread))


def _orders(m: int, n: int, permutations: int, seed: int) -> NDArray[np.bool_]:
    """[1 + permutations, m + n]: which rows are taken for the first set; the true ones first."""
    draw = np.random.default_rng(seed)
    first = np.tile(np.arange(m + n) < m, (1 + permutations, 1))
    first[1:] = draw.permuted(first[1:], axis=1)
    return first


def _p(values: NDArray[np.float64]) -> float:
    """Share of orders at least as far out as the true one, which is one of them; equal up to rounding counts."""
    return float((values >= values[0] - 1e-12).mean())


def _joined(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    if min(len(x), len(y)) < FEWEST:
        raise DataError(f"two samples: {len(x)} and {len(y)} rows given. Give at least {FEWEST} of each.")
    if x.shape[1:] != y.shape[1:]:
        raise DataError(f"two samples: vectors of width {x.shape[1:]} and {y.shape[1:]}. Give both by one model.")
    return np.concatenate([x, y]).astype(np.float64)
