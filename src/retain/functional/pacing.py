"""When replay comes: progress of training under a fraction that moves, and blocks of replay every so many steps.

Progress t is counted in optimizer steps, that is in rows shown, so that the mean of the fraction over t is the share
of replay in all that is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from retain.errors import ConfigError

#: Replay fraction as a function of the progress of training in [0, 1].
Fraction = Callable[[float], float]

_CELLS = 4096  # parts of [0, 1] in which a fraction is taken at the middle


def checked(value: float, t: float, below: float = 1.0) -> float:
    """A value of a schedule, or ConfigError where it is outside [0, below)."""
    if not 0 <= value < below:
        what, most = ("fraction", f"below {below:g}") if below < math.inf else ("value", "finite")
        raise ConfigError(f"schedule: {what} {value:g} at t = {t:g}; allowed: at least 0 and {most}.")
    return value


def mean_share(fraction: Fraction, ratio: float = 1.0) -> float:
    """The share of replay rows in all rows of a training, ∫ r(t) dt with r = f·ratio / (1 − f + f·ratio).

    Args:
        fraction: f, values in [0, 1).
        ratio: mean weight of a new row over that of a replay row, where the fraction counts weight (tokens).
    """
    return math.fsum(_row_shares(fraction, ratio)) / _CELLS


def progress(fraction: Fraction, done: np.ndarray, ratio: float = 1.0) -> np.ndarray:
    """The t at which a part `done` of all new rows has been shown: ∫₀ᵗ (1 − r) = done · ∫₀¹ (1 − r).

    Args:
        fraction, ratio: see `mean_share`.
        done: values in [0, 1].
    """
    shown = np.concatenate([[0.0], np.cumsum(1 - _row_shares(fraction, ratio))])
    return np.interp(done, shown / shown[-1], np.linspace(0, 1, _CELLS + 1))


def _row_shares(fraction: Fraction, ratio: float) -> np.ndarray:
    middles = ((np.arange(_CELLS) + 0.5) / _CELLS).tolist()
    f = np.fromiter((checked(fraction(t), t) for t in middles), float, _CELLS)
    return f if ratio == 1.0 else f * ratio / (1 - f + f * ratio)


def in_blocks(replayed: np.ndarray, period: int, spread: float = 0.0) -> np.ndarray:
    """An order in which the replay rows of each period come together at its end; nothing is added or left out.

    Args:
        replayed: [n] booleans, rows in the order in which they would be shown.
        period: rows of a period (steps × rows per step); the last one may be shorter.
        spread: share of the replay rows that keep their place, counted over all of them.

    Returns:
        int64 [n], a permutation of 0 … n − 1 that keeps the order within the new and within the moved rows.
    """
    number = np.cumsum(replayed)
    stays = np.floor(number * spread) > np.floor((number - 1) * spread)
    return np.lexsort((replayed & ~stays, np.arange(len(replayed)) // period))
