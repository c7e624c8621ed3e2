"""Calibration of choices: how far the confidence of a model is from how often it is right.

The probability of an option is the softmax over the options of an item's log-likelihoods log p(option | prompt), the
confidence of an item the largest of them, and it is right when that option is the right one. Normalised scores (per
character, per token) choose well, but they are no probabilities and are not used here.

The binned error is biased upwards, by roughly √(bins/n) times a constant, more for a model whose confidences spread
over more bins; it is 0 only in the limit of many items. What it is good for is a difference on the same items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retain.errors import DataError
from retain.functional.statistics import Interval, Sums, bootstrap

BINS = 15

Array = NDArray[np.float64]


def option_probabilities(log_likelihoods: ArrayLike) -> Array:
    """Softmax over the options of one item; (k,) → (k,)."""
    values = np.asarray(log_likelihoods, dtype=float)
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def brier(probabilities: ArrayLike, answer: int) -> float:
    """Σ_k (p_k − [k is right])² of one item, between 0 and 2 (Brier 1950, Mon. Weather Rev. 78:1, eq. 2)."""
    errors = np.array(probabilities, dtype=float)
    errors[answer] -= 1
    return float(errors @ errors)


def bin_of(confidence: ArrayLike, bins: int = BINS, adaptive: bool = False) -> NDArray[np.intp]:
    """The bin of every confidence, 0 to bins − 1.

    Args:
        confidence: (n,), between 0 and 1.
        adaptive: edges at the quantiles of these confidences, so that bins hold about equally many (Nguyen, O'Connor
            2015, arXiv:1508.05154, §3); else bins of equal width, the m-th from (m−1)/M, left out, to m/M.

    Raises:
        DataError: fewer than one bin, no confidences, or some outside [0, 1].
    """
    values = np.asarray(confidence, dtype=float)
    if bins < 1:
        raise DataError(f"calibration: {bins} bins given; allowed is 1 or more.")
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"calibration: confidences of shape {values.shape} given; allowed: (n,) between 0 and 1.")
    steps = np.linspace(0, 1, bins + 1)
    edges = np.quantile(values, steps) if adaptive else steps
    return np.searchsorted(edges[1:-1], values)


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = BINS, adaptive: bool = False) -> float:
    """Expected calibration error Σ_m (n_m/n) |mean right − mean confidence| (Guo 2017, arXiv:1706.04599, eq. 3).

    Args:
        confidence: (n,), between 0 and 1.
        right: (n,), 0 or 1.
        bins, adaptive: as in `bin_of`.

    Raises:
        DataError: as `bin_of`.
    """
    gaps = _gaps(confidence, right, bins, adaptive)
    return float(np.abs(gaps.sum(0)).sum() / len(gaps))


def calibration_change(
    before: tuple[ArrayLike, ArrayLike],
    after: tuple[ArrayLike, ArrayLike],
    confidence: float = 0.95,
    bins: int = BINS,
    adaptive: bool = False,
    seed: int = 0,
) -> Interval:
    """Calibration error after − before on the same items, with a paired bootstrap interval (BCa).

    An item is resampled with its bin and gap before *and* after. Adaptive edges stay those of all items.

    Args:
        before, after: (confidence (n,), right (n,)), in the same order of items.
        confidence: of the interval.

    Raises:
        DataError: as `bin_of`; other numbers of items before and after; fewer than two.
    """
    old, new = (_gaps(*side, bins, adaptive) for side in (before, after))
    if len(old) != len(new):
        raise DataError(f"calibration: {len(old)} items before, {len(new)} after. Give the same items.")
    old, new = (gaps[:, gaps.any(0)] for gaps in (old, new))
    split = old.shape[1]

    def change(sums: Sums) -> Array:
        gaps, items = np.abs(sums[0][..., :-1]), sums[0][..., -1]
        return (gaps[..., split:].sum(-1) - gaps[..., :split].sum(-1)) / items

    return bootstrap([np.concatenate([old, new, np.ones((len(old), 1))], axis=1)], change, confidence, seed=seed)


def confidences(log_likelihoods: Sequence[Sequence[float]], answers: Sequence[int]) -> tuple[Array, Array, Array]:
    """Confidence, right or not, and Brier score of n items, all (n,).

    Args:
        log_likelihoods: of the options of each item, in nats.
        answers: index of the right option of each item.
    """
    probabilities = [option_probabilities(values) for values in log_likelihoods]
    return (
        np.array([min(1.0, float(p.max())) for p in probabilities]),
        np.array([float(int(p.argmax()) == answer) for p, answer in zip(probabilities, answers, strict=True)]),
        np.array([brier(p, answer) for p, answer in zip(probabilities, answers, strict=True)]),
    )


def _gaps(confidence: ArrayLike, right: ArrayLike, bins: int, adaptive: bool) -> Array:
    """(n, bins): right − confidence of an item in the column of its bin, else 0."""
    values, hits = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    places = bin_of(values, bins, adaptive)
    if hits.shape != values.shape or not all(math.isfinite(hit) for hit in hits):
        raise DataError(f"calibration: {hits.shape} outcomes for {values.shape} confidences. Give one for each.")
    gaps = np.zeros((len(values), bins))
    gaps[np.arange(len(values)), places] = hits - values
    return gaps
