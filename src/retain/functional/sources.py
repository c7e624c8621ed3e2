"""Which old rows are replayed when they come from several sources: shares, and rows in random passes.

p_i ∝ w_i · n_i^(1/T)        T = 1: every row alike; T → ∞: every source alike (temperature sampling,
                             Devlin et al. 2019, multilingual BERT; Xue et al. 2021, arXiv:2010.11934)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retain.errors import ConfigError

STREAM = 1  # of random numbers; `sampling` uses others


def shares(sizes: Sequence[float] | np.ndarray, weights: Sequence[float], temperature: float = 1.0) -> np.ndarray:
    """Share of each source in what is replayed; they sum to 1.

    Args:
        sizes: n > 0, rows or supervised tokens of each source.
        weights: w > 0.
        temperature: T > 0; infinity leaves the weights alone.

    Raises:
        ConfigError: a number out of range.
    """
    n, w = np.asarray(sizes, float), np.asarray(weights, float)
    if len(n) != len(w) or not (n > 0).all() or not (w > 0).all() or not temperature > 0:
        raise ConfigError(
            f"replay.sources: sizes {n.tolist()}, weights {w.tolist()}, temperature {temperature:g} given; allowed: "
            "one weight for each source, all above 0."
        )
    logs = np.log(w) + np.log(n) / temperature
    p = np.exp(logs - logs.max())
    return p / p.sum()


@dataclass(frozen=True)
class Sources:
    """Which source each replay row is from, and what each weighs.

    Args:
        names: of the sources.
        origin: [M] number of the source of each replay row.
        weights: w of each source.
        temperature: T.
    """

    names: tuple[str, ...]
    origin: np.ndarray
    weights: tuple[float, ...]
    temperature: float = 1.0

    def sentence(self) -> str:
        """Rows of each source, in words."""
        counts = np.bincount(self.origin, minlength=len(self.names)).tolist()
        return ", ".join(f"{name} {count}" for name, count in zip(self.names, counts))

    def shares(self, row_weights: np.ndarray) -> np.ndarray:
        """The share of each source, in what the row weights [M] count."""
        sizes = np.bincount(self.origin, row_weights, len(self.names))
        return shares(sizes, self.weights, self.temperature)


def odds(new_weights: np.ndarray, row_weights: np.ndarray, sources: Sources | None = None) -> float:
    """Mean weight of a new row over that of the rows that `draws` gives, which is 1 / Σ_i (p_i / mean of source i).

    1 where there are no rows of one kind.
    """
    if not len(new_weights) or not len(row_weights):
        return 1.0
    if sources is None:
        return float(new_weights.mean() / row_weights.mean())
    count = np.bincount(sources.origin, minlength=len(sources.names))
    means = np.bincount(sources.origin, row_weights, len(sources.names)) / count
    return float(new_weights.mean() * (sources.shares(row_weights) / means).sum())


def draws(row_weights: np.ndarray, amount: float, seed: int, sources: Sources | None = None) -> np.ndarray:
    """Replay rows in the order of their use, at least as many as weigh `amount` together.

    Each source is gone through in random passes, each row once per pass. Row k of source i comes when
    (what i has given before it + half its weight) / p_i, so that at every moment each source has given its share to
    within a row. More rows are asked for: the first ones stay the same.

    Args:
        row_weights: [M], 1 for each row or its supervised tokens.
        amount: what is wanted.
        seed: any non-negative integer.
        sources: default: one source.
    """
    origin = np.zeros(len(row_weights), np.int64) if sources is None else sources.origin
    p = np.ones(1) if sources is None else sources.shares(row_weights)
    enough = amount + len(p) * row_weights.max()  # where one source is a row late
    rows, due = [], []
    for source, share in enumerate(p.tolist()):
        mine = np.flatnonzero(origin == source)
        passes = int(np.ceil(enough * share / row_weights[mine].sum())) + 1
        keys = [[seed, number, STREAM, *([source] if source else [])] for number in range(passes)]
        drawn = np.concatenate([mine[np.random.default_rng(key).permutation(len(mine))] for key in keys])
        given = row_weights[drawn]
        rows.append(drawn)
        due.append((np.cumsum(given) - given / 2) / share)
    order = np.argsort(np.concatenate(due), kind="stable")
    drawn = np.concatenate(rows)[order]
    return drawn[: int(np.searchsorted(np.cumsum(row_weights[drawn]), enough)) + 1]
