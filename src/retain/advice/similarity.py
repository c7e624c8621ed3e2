"""How much new rows are like what a model knows: one number from 0 to 1, of two that are measured.

    by loss        min(1, exp(L_general − L_new))       L = −log p of the answers by the base, nats per token
    by embedding   min(1, d_general / d_new)            d = median distance of a row to the nearest general one

The first is the probability that the base gives to a token of a new answer, over that of a general answer. In the
second, vectors are the base's mean hidden states, each direction at variance 1 over the general rows; a general row is
not its own neighbour. `similarity` is the geometric mean of both. The bands at 0.8 and 0.5 are those of the freeze
shares (`retain.functional.freezing`), which were given for no certain measure: taken with this one they are a rule of
thumb, and what it gives on real rows is in docs/advise.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retain.advice.reading import Progress, Reader, Sample
from retain.functional.statistics import Interval, mean_interval

#: Rows read of each side.
ROWS = 64


@dataclass(frozen=True)
class Similarity:
    """What was measured.

    Args:
        loss, general_loss: nats per token, with 95 % intervals over rows.
        by_loss, by_embedding: 0 to 1.
        rows, general_rows: read.
        against: what stood for general rows.
    """

    loss: Interval
    general_loss: Interval
    by_loss: float
    by_embedding: float
    rows: int
    general_rows: int
    against: str

    @property
    def value(self) -> float:
        """Similarity, 0 to 1."""
        return math.sqrt(self.by_loss * self.by_embedding)

    def sentence(self) -> str:
        """In words."""
        return (
            f"similarity {self.value:.2f}: the base has {self.loss.value:.2f} nats per token "
            f"[{self.loss.low:.2f}, {self.loss.high:.2f}] on {self.rows} new answers and {self.general_loss.value:.2f} "
            f"[{self.general_loss.low:.2f}, {self.general_loss.high:.2f}] on {self.general_rows} of {self.against} "
            f"(by loss {self.by_loss:.2f}); by distance of embeddings {self.by_embedding:.2f}"
        )


def measure(reader: Reader, new: Sample, general: Sample, progress: Progress = lambda n: None) -> Similarity:
    """Read both and compare.

    Args:
        new: rows to learn; two or more.
        general: rows that stand for what the model knows; three or more.
    """
    losses = [reader.losses(rows, progress) for rows in (new, general)]
    mine, theirs = (mean_interval(one[:, 0] / one[:, 1], weights=one[:, 1]) for one in losses)
    by_embedding = nearness(reader.vectors(new, progress), reader.vectors(general, progress))
    return Similarity(
        mine,
        theirs,
        min(1.0, math.exp(theirs.value - mine.value)),
        by_embedding,
        len(new),
        len(general),
        general.name,
    )


def nearness(new: NDArray[Any], general: NDArray[Any]) -> float:
    """min(1, d_general / d_new) of vectors [n, H] and [m, H], m ≥ 3; 1 where the new rows are general ones."""
    centre, spread = general.mean(0), general.std(0)
    kept = spread > 1e-6 * max(1e-12, float(spread.max()))
    a, b = ((one[:, kept] - centre[kept]) / spread[kept] for one in (new, general))
    own = _distances(b, b)
    np.fill_diagonal(own, np.inf)
    usual, found = float(np.median(own.min(1))), float(np.median(_distances(a, b).min(1)))
    return 1.0 if found <= usual else usual / found


def _distances(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    from scipy.spatial.distance import cdist

    return cdist(a, b)
