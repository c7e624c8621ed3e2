"""One run against another from the same base, on the same items: what both lost, and how much of it one saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from retain.errors import RunError
from retain.functional import statistics
from retain.items import Array, Kind, Rows, align, by_probe, estimate, sign_of
from retain.results import Estimate, ProbeInfo


class Comparison(NamedTuple):
    """Two runs from the same base on the same items (`compare_runs`); losses are positive.

    `ratio` is lost_b/lost_a, None where it is not certain that A lost anything. `excess` is
    lost_b − fraction·lost_a; `holds` says that A lost something and B at most `fraction` of it, each at the
    one-sided confidence of the comparison.
    """

    lost_a: Estimate
    lost_b: Estimate
    saved: Estimate  # lost_a − lost_b
    ratio: Estimate | None
    excess: Estimate
    fraction: float
    holds: bool
    probes: list[str]
    items: int
    unit: str


def compare_runs(
    base: Rows,
    a: Rows,
    b: Rows,
    infos: Iterable[ProbeInfo],
    fraction: float = 0.2,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """How much of what run A lost did run B lose, on the same items: lost_B/lost_A and whether ≤ `fraction`.

    The loss of a run is the mean over probes of base − run (positive = worse; nats per token for perplexity).
    Items are resampled within probes, with their base, A and B scores together, so what they share cancels.
    `holds` rests on lost_B − fraction·lost_A, which unlike the ratio is well behaved near 0.

    Args:
        base, a, b: rows of all probes; A is the run to compare with (naive), B the one with the claim.
        infos: the probes to use: all scored from 0 to 1, or all perplexity.

    Raises:
        RunError: no probes, kinds that do not mix, items that differ; or as `change`.
    """
    infos = list(infos)
    tables = [by_probe(rows) for rows in (base, a, b)]
    plain: list[Array] = []
    padded: list[Array] = []
    kinds: set[Kind] = set()
    items = 0
    for info in infos:
        start, end_a, end_b = (table.get(info.name, []) for table in tables)
        pairs = [align(start, end, info) for end in (end_a, end_b)]
        kinds.update(pair.kind for pair in pairs)
        weights = np.ones(len(start)) if pairs[0].weights is None else pairs[0].weights
        losses = [-sign_of(info) * pair.difference * weights for pair in pairs]
        plain.append(np.stack([*losses, weights], axis=1))
        size = 1 / math.sqrt(len(infos))
        blind = any(statistics.needs_padding(pair.difference, pair.weights) for pair in pairs)
        padded.append(statistics.pad(plain[-1], [size, -size]) if blind else plain[-1])
        items += len(start)
    if len(kinds) != 1 or "other" in kinds:
        raise RunError(
            f"compare: probes {[i.name for i in infos]} are of kinds {sorted(kinds)}. Give one or more, "
            "all scored from 0 to 1 or all perplexity."
        )

    def interval(statistic: Callable[[statistics.Sums], Array], level: float = confidence) -> Estimate:
        value = float(statistic([units.sum(0) for units in plain]))
        return estimate(statistics.bootstrap(padded, statistic, level, seed=seed, value=value, bca=False))

    def loss(weight_a: float, weight_b: float) -> Callable[[statistics.Sums], Array]:
        return lambda sums: weight_a * _mean_loss(sums, 0) + weight_b * _mean_loss(sums, 1)

    lost_a, one_sided = interval(loss(1, 0)), 2 * confidence - 1
    ratio = None
    if lost_a.low > 0:
        found = interval(_ratio)
        ratio = found if math.isfinite(found.high) else None
    certain = interval(loss(1, 0), one_sided).low > 0 and interval(loss(-fraction, 1), one_sided).high <= 0
    return Comparison(
        lost_a=lost_a,
        lost_b=interval(loss(0, 1)),
        saved=interval(loss(1, -1)),
        ratio=ratio,
        excess=interval(loss(-fraction, 1)),
        fraction=fraction,
        holds=certain,
        probes=[info.name for info in infos],
        items=items,
        unit="nats per token" if kinds == {"perplexity"} else "score",
    )


def _mean_loss(sums: statistics.Sums, column: int) -> Array:
    return np.mean([s[..., column] / s[..., -1] for s in sums], axis=0)


def _ratio(sums: statistics.Sums) -> Array:
    # A draw in which A lost nothing must count as a large ratio; dividing would make it a negative one.
    lost_a, lost_b = _mean_loss(sums, 0), _mean_loss(sums, 1)
    return np.divide(lost_b, lost_a, out=np.full_like(lost_a, np.inf), where=lost_a > 0)
