"""How small a loss so many items can be sure of, before anything was trained: the inverse of `budget.items_needed`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from retain.errors import DataError
from retain.functional.budget import POWER, upper_of


def certifiable(
    sizes: Sequence[float], confidence: float = 0.95, discordance: float = 0.0, power: float = POWER
) -> float:
    """The smallest mean loss of score that probes of these sizes can be sure of, where none is on average.

    The upper bound of `budget.loss_bound` with answers that are all the same; with flips, as many gained as lost, what
    it is at most with the given power. A budget below it cannot be met, however good the training is.

    Args:
        sizes: items of each probe.
        confidence: one-sided.
        discordance: share of items whose score flips.

    Raises:
        DataError: no items, or a discordance that is no share.
    """
    counts = np.asarray(sizes, dtype=float)
    if not len(counts) or (counts <= 0).any() or not 0 <= discordance <= 1:
        raise DataError(
            f"certifiable: sizes {list(sizes)}, discordance {discordance}. Give items, and a share of them."
        )
    flips = np.full(len(counts), float(discordance))
    error = math.sqrt(float((flips / counts).sum())) / len(counts)
    unlucky = np.full(len(counts), min(float(stats.norm.ppf(power)) * error, discordance))
    return upper_of(unlucky, flips, counts, confidence)
