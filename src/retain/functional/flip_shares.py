"""Intervals of the shares of items lost (`forgetting.sample_forgetting`), for one probe or a mean over several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retain.functional import statistics
from retain.functional.forgetting import paired_contributions, sample_forgetting
from retain.functional.statistics import Interval

Array = NDArray[np.float64]
_FEW_LOST = 10


class Outcomes(NamedTuple):
    """One probe: right (1) or wrong (0) before and after, (n,); options of each item, None where there are none."""

    before: ArrayLike
    after: ArrayLike
    choices: Any = None


class ShareIntervals(NamedTuple):
    """Share of items lost by the three estimators of `sample_forgetting`."""

    raw: Interval
    adjusted: Interval
    paired: Interval


def lost_shares(probes: Sequence[Outcomes], confidence: float = 0.95, seed: int = 0) -> ShareIntervals:
    """Unweighted mean over probes of the share of items lost, three ways, each with a bootstrap interval.

    Items are resampled within each probe with what they were before and after. Where fewer than ten items of a probe
    were lost, one more and one less are added before resampling, as in `statistics.paired_interval`: no loss among
    20 items does not show that none is possible. A share of items is not below 0, and the ends of raw and adjusted
    are cut there; paired is left as it is, so that means over probes stay unbiased.

    Raises:
        DataError: as `sample_forgetting`; or a probe with one item.
    """
    options = [_options(p) for p in probes]
    plain = [_columns(p, ks) for p, ks in zip(probes, options)]
    padded = [_padded(units, ks, len(probes)) for units, ks in zip(plain, options)]
    values = np.mean([sample_forgetting(*p)[:3] for p in probes], axis=0)

    def interval(place: int, statistic: Callable[[Array, Array], Array], lowest: float) -> Interval:
        found = statistics.bootstrap(
            padded,
            lambda sums: np.mean([statistic(s, ks) for s, ks in zip(sums, options)], axis=0),
            confidence,
            seed=seed,
            value=float(values[place]),
            bca=False,
        )
        return Interval(found.value, max(found.low, lowest), found.high)

    return ShareIntervals(
        interval(0, lambda s, ks: s[..., 0] / s[..., -1], 0.0),
        interval(1, _adjusted, 0.0),
        interval(2, lambda s, ks: s[..., 1] / s[..., -1], -math.inf),
    )


def _listed(probe: Outcomes) -> Array:
    """Number of options of each item, 0 for none."""
    one = probe.choices is None or np.ndim(probe.choices) == 0
    listed = [probe.choices] * len(np.asarray(probe.before)) if one else probe.choices
    return np.array([k or 0 for k in listed], dtype=float)


def _options(probe: Outcomes) -> Array:
    """Distinct numbers of options."""
    return np.unique(_listed(probe))


def _columns(probe: Outcomes, options: Array) -> Array:
    """Per item: lost, what it adds to the paired estimator, for each number of options (lost, wrong before, wrong
    after, 1), and 1."""
    before, after = np.asarray(probe.before, dtype=bool), np.asarray(probe.after, dtype=bool)
    n, own = len(before), _listed(probe)
    lost = before & ~after
    columns = [lost, paired_contributions(before, after, probe.choices)]
    for k in options:
        columns += [flag & (own == k) for flag in (lost, ~before, ~after, np.ones(n, dtype=bool))]
    return np.stack([*columns, np.ones(n)], axis=1).astype(float)


def _padded(units: Array, options: Array, probes: int) -> Array:
    if np.count_nonzero(units[:, 0]) >= _FEW_LOST:
        return units
    size, commonest = 1 / math.sqrt(probes), int(np.argmax(units[:, 5:-1:4].sum(0)))
    extra = np.zeros((2, units.shape[1]))
    k = options[commonest]
    extra[:, 0] = extra[:, 2 + 4 * commonest] = size, -size
    extra[:, 1] = extra[:, 0] * (k / (k - 1) if k else 1)
    extra[:, -1] = extra[:, 5 + 4 * commonest] = 1
    return np.concatenate([units, extra])


def _adjusted(sums: Array, options: Array) -> Array:
    total: Array = np.zeros(sums.shape[:-1])
    for place, k in enumerate(options):
        lost, wrong_before, wrong_after, items = np.moveaxis(sums[..., 2 + 4 * place : 6 + 4 * place], -1, 0)
        if k:
            lost = np.maximum(0, lost - wrong_before * wrong_after / np.maximum(items, 1) / (k - 1))
        total = total + lost
    return total / sums[..., -1]
