"""How sure a choice is: scores become probabilities, and "nobody" gets a threshold, both on held-out questions.

Scores s [n, K + 1] are one column per expert and, last, one for nobody. With two numbers that are fitted,

    p = softmax(s / T + b·[nobody])                 T > 0

which is temperature scaling (Guo et al. 2017, arXiv:1706.04599, §4.2) with an offset for nobody: order and relative
distance of the experts stay, so three questions per expert are enough. An expert answers when the likeliest has at
least the threshold's probability. Half of the weight is on the experts' questions and half on those for nobody, however
many there are of each: what the share will be later is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

Array = NDArray[np.float64]

FOLDS = 5
#: log T is kept in this range: of scores that separate everything the best T is 0.
_LOG_TEMPERATURE = (-7.0, 7.0)


@dataclass(frozen=True)
class Calibration:
    """From scores to probabilities and decisions.

    Args:
        temperature: T.
        nobody: b, added to the column of nobody.
        threshold: least probability with which an expert answers, 0..1.
        right: share of held-out questions that were decided right, half of it experts' questions, half nobody's.
    """

    temperature: float
    nobody: float
    threshold: float
    right: float

    def probabilities(self, scores: ArrayLike) -> Array:
        """softmax(s / T + b·[nobody]); [n, K + 1] → [n, K + 1], rows add up to 1."""
        return softmax(_shifted(scores, self.temperature, self.nobody), axis=1)

    def decisions(self, probabilities: Array) -> NDArray[np.intp]:
        """Column of the choice, K for nobody; [n, K + 1] → [n]."""
        best = probabilities[:, :-1].argmax(1)
        return np.where(probabilities[:, :-1].max(1) >= self.threshold, best, probabilities.shape[1] - 1)


def weights(labels: NDArray[np.intp], nobody: int) -> Array:
    """Weight of every question: experts' questions together 1/2, nobody's together 1/2; [n] → [n], sum 1."""
    own = labels != nobody
    found = np.where(own, 0.5 / max(1, own.sum()), 0.5 / max(1, (~own).sum()))
    return found / found.sum()


def calibrate(scores: ArrayLike, labels: ArrayLike) -> Calibration:
    """Temperature, offset and threshold that fit held-out questions best.

    T and b minimise the weighted negative log-likelihood, which is convex in (1/T, b). The threshold is the one with
    the most weighted right decisions; of a stretch of equally good ones, the middle of the widest.

    Args:
        scores: [n, K + 1], of questions that the scores were not learnt from.
        labels: [n], 0..K; K for nobody.
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=int)
    nobody = scores.shape[1] - 1
    share = weights(labels, nobody)
    spread = max(float(np.abs(scores - scores.mean(1, keepdims=True)).mean()), 1e-9)  # so that T near 1 is the start

    def loss(point: Array) -> float:
        shifted = _shifted(scores / spread, np.exp(point[0]), point[1])
        return float(-(share * log_softmax(shifted, axis=1)[np.arange(len(labels)), labels]).sum())

    bounds = [_LOG_TEMPERATURE, (-50.0, 50.0)]
    log_temperature, offset = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=bounds).x
    fitted = Calibration(float(np.exp(log_temperature) * spread), float(offset), 0.0, 0.0)
    threshold, right = _threshold(fitted.probabilities(scores), labels, share)
    return Calibration(fitted.temperature, fitted.nobody, threshold, right)


def _threshold(probabilities: Array, labels: NDArray[np.intp], share: Array) -> tuple[float, float]:
    """(threshold, weighted share of right decisions with it)."""
    best, top = probabilities[:, :-1].argmax(1), probabilities[:, :-1].max(1)
    order = np.argsort(top)
    gain = np.where(best == labels, share, 0.0)[order]  # when the expert answers
    refused = np.where(labels == probabilities.shape[1] - 1, share, 0.0)[order]  # when nobody does
    # right[i]: the i questions with the lowest probability go to nobody
    right = np.concatenate([[0.0], refused.cumsum()]) + gain.sum() - np.concatenate([[0.0], gain.cumsum()])
    edges = np.concatenate([[0.0], top[order], [1.0]])
    possible = np.flatnonzero(np.diff(edges) > 0)  # equal probabilities cannot be told apart
    good = possible[right[possible] >= right[possible].max() - 1e-12]
    widest = good[np.diff(edges)[good].argmax()]
    return float(edges[widest : widest + 2].mean()), float(right[widest])


def held_out(
    rows: Any,
    labels: NDArray[np.intp],
    learn: Callable[[Any, NDArray[np.intp]], Any],
    score: Callable[[Any, Any], Array],
    seed: int = 0,
) -> Array:
    """Scores [n, K + 1] of every question by what was learnt from the others (stratified cross-validation).

    Args:
        rows: [n, …] what the router sees of the questions.
        labels: [n], 0..K, at least two questions each.
        learn: rows and labels → what was learnt.
        score: that and rows → scores.
    """
    from sklearn.model_selection import StratifiedKFold

    folds = min(FOLDS, int(np.bincount(labels).min()))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
    found: list[tuple[Any, Array]] = []
    for kept, left in splits:
        found.append((left, score(learn(rows[kept], labels[kept]), rows[left])))
    result = np.empty((len(labels), found[0][1].shape[1]))
    for left, scores in found:
        result[left] = scores
    return result


def _shifted(scores: ArrayLike, temperature: float, nobody: float) -> Array:
    shifted = np.array(scores, dtype=float) / temperature
    shifted[:, -1] += nobody
    return shifted
