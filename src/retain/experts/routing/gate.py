"""Router by a trained gate: logistic regression on the base model's mean hidden states, with nobody as a class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retain.experts.routing.base import Labels, Learned
from retain.experts.routing.linear import fit_linear
from retain.experts.routing.vectors import OnVectors, unit

#: Inverse of the penalty on standardised states; 0.01 is about as good on the domains of bench/routing.py.
STRENGTH = 0.1


class Gate(OnVectors):
    """Multinomial logistic regression on standardised states.

    Args:
        reader: texts → vectors [n, H], as `models.states.StateReader`.
        settings: as for `Router`.
    """

    name = "gate"

    def learn(self, rows: NDArray[np.float32], labels: Labels) -> Learned:
        middle, spread = rows.mean(0), np.maximum(rows.std(0), 1e-6)
        features = (rows - middle) / spread
        coefficients, offsets = fit_linear(features, labels, STRENGTH)
        return {
            "middle": middle,
            "spread": spread,
            "weights": coefficients,
            "offsets": offsets,
            "vectors": unit(features).astype(np.float16),  # of the examples, to find the nearest
        }

    def score(self, learned: Learned, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        features = (rows - learned["middle"]) / learned["spread"]
        return np.asarray(features @ learned["weights"].T + learned["offsets"], dtype=float)

    def explain(self, prompt: str, row: NDArray[np.float32], scores: NDArray[np.float64], expert: int) -> str:
        chances = self.calibration.probabilities(scores[None])[0]
        rival = int(np.where(np.arange(len(scores)) == expert, -1, chances).argmax())
        against = self.experts[rival] if rival < len(self.experts) else "nobody"
        near = self.nearest_to(row, expert)
        return f"{_odds(chances[expert], chances[rival])} {against}; its nearest question is {near}"

    def nearest_to(self, row: NDArray[np.float32], expert: int) -> str:
        """The example question of an expert whose states are most like those of a row [H], quoted."""
        features = (row - self.learned["middle"]) / self.learned["spread"]
        return self.nearest(self.learned["vectors"].astype(np.float32) @ unit(features), expert)


def _odds(chance: float, other: float) -> str:
    odds = chance / max(other, 1e-12)
    if odds >= 1000:
        return "more than 1,000 times as likely as"
    return f"{odds:.0f} times as likely as" if odds >= 10 else f"{odds:.1f} times as likely as"
