"""Intervals of the numbers of a verdict (`forgetting.verdict_numbers`): items resampled within every probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retain.functional import statistics
from retain.functional.forgetting import VerdictNumbers
from retain.functional.statistics import Interval

Array = NDArray[np.float64]
NAMES = ("forgetting", "improvement", "balance", "mean_reference", "stability_efficiency")


class Scores(NamedTuple):
    """Scores of the items of one probe before and after, (n,), and their weights.

    `form`: "higher" is better, "lower" is better, or "perplexity" (nats per token; weights are tokens). `counted`: a
    share between 0 and 1, which belongs to the mean reference score.
    """

    before: ArrayLike
    after: ArrayLike
    weights: ArrayLike | None
    form: Literal["higher", "lower", "perplexity"]
    counted: bool


def verdict_intervals(
    reference: Sequence[Scores],
    tasks: Sequence[Scores],
    numbers: VerdictNumbers,
    confidence: float = 0.95,
    seed: int = 0,
    keep_weight: float = 0.6,
    learn_weight: float = 0.4,
) -> dict[str, Interval]:
    """`NAMES` with paired bootstrap intervals around the given numbers; improvement only where there are tasks.

    Where few items changed, one gained and one lost item are added first, as in `statistics.paired_interval`.

    Raises:
        DataError: a probe with one item.
    """
    probes = [*reference, *tasks]
    units = [_units(probe, len(probes)) for probe in probes]

    def found(sums: statistics.Sums) -> dict[str, Array]:
        moved = [_relative(probe, s) for probe, s in zip(probes, sums)]
        old = moved[: len(reference)]
        kept = [after for (_, _, after), p in zip(old, reference) if p.counted]
        f = np.mean([np.clip(drop, 0, 1) for drop, _, _ in old], axis=0)
        g = np.mean([gain for _, gain, _ in moved[len(reference) :]], axis=0) if tasks else np.zeros_like(f)
        score = np.mean(kept, axis=0) if kept else np.mean([1 - np.clip(drop, 0, 1) for drop, _, _ in old], axis=0)
        balance = keep_weight * (1 - f) + learn_weight * np.clip(0.5 + g / 2, 0, 1)
        return dict(zip(NAMES, (f, g, balance, score, score * balance)))

    def interval(name: str) -> Interval:
        value = getattr(numbers, name)
        return statistics.bootstrap(units, lambda s: found(s)[name], confidence, seed=seed, value=value, bca=False)

    return {name: interval(name) for name in NAMES if tasks or name != "improvement"}


def retention_interval(probe: Scores, value: float, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Retention of one probe in percent, 100·(1 − relative drop), around `value` with a paired bootstrap interval.

    Where few items of a share changed, a lost and a gained item are added first: (1, 0) and (0, 1), before and after.
    The padding of `verdict_intervals`, ±1 on the score after, is right for a difference; a ratio of few known items it
    makes far too wide.

    Raises:
        DataError: one item.
    """

    def retained(sums: statistics.Sums) -> Array:
        return 100 * (1 - np.clip(_relative(probe, sums[0])[0], 0, 1))

    units = _units(probe, 1)
    if probe.counted and len(units) > len(np.asarray(probe.before)):
        units = np.concatenate([units[:-2], [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]])
    return statistics.bootstrap([units], retained, confidence, seed=seed, value=value, bca=False)


def _units(probe: Scores, probes: int) -> Array:
    before, after = np.asarray(probe.before, dtype=float), np.asarray(probe.after, dtype=float)
    weights = np.ones_like(before) if probe.weights is None else np.asarray(probe.weights, dtype=float)
    units = np.stack([weights * before, weights * after, weights], axis=1)
    blind = statistics.needs_padding(after - before, probe.weights)
    return statistics.pad(units, [0.0, 1 / math.sqrt(probes)]) if blind else units


def _relative(probe: Scores, sums: Array) -> tuple[Array, Array, Array]:
    """Relative drop and gain of a probe, and its score after."""
    before, after = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
    if probe.form == "perplexity":
        rise = np.exp(after - before) - 1
        return rise, -rise, after
    sign = 1 if probe.form == "higher" else -1
    something = before > 0
    share = sign * (after - before) / np.where(something, before, 1)
    drop = np.where(something, -share, 0.0 if sign > 0 else -share)
    return np.maximum(drop, 0), np.where(something, share, np.sign(share)), after
