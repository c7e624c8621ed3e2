"""Calibration and the threshold of nobody, against scikit-learn, brute force and synthetic truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from retain.experts.routing import confidence
from retain.experts.routing.confidence import Calibration, calibrate


def drawn(n: int, columns: int, scale: float, seed: int = 0):
    """Logits of which softmax(logits) is the truth, labels drawn from it, and the logits times `scale`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, columns)) * 2
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # a draw from softmax(logits)
    return logits, labels, logits * scale


@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_the_true_temperature_is_found(scale):
    _, labels, scores = drawn(6000, 4, scale)
    found = calibrate(scores, labels)
    assert found.temperature == pytest.approx(scale, rel=0.1)


def test_one_expert_is_platt_scaling_as_scikit_learn_does_it():
    """With one expert p = σ(d/T − b), d its score above nobody's: a logistic regression without penalty."""
    _, labels, scores = drawn(900, 2, 3.0)
    gap = scores[:, :1] - scores[:, 1:]
    regression = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000)
    regression.fit(gap, labels == 0, sample_weight=confidence.weights(labels, 1) * len(labels))
    found = calibrate(scores, labels)
    assert 1 / found.temperature == pytest.approx(regression.coef_[0, 0], rel=1e-3)
    assert found.nobody == pytest.approx(-regression.intercept_[0], abs=1e-3)
    assert found.probabilities(scores)[:, 0] == pytest.approx(regression.predict_proba(gap)[:, 1], abs=1e-3)


def test_confidences_are_how_often_it_is_right():
    _, labels, scores = drawn(8000, 4, 7.0)
    found = calibrate(scores[:4000], labels[:4000])
    chances = found.probabilities(scores[4000:])
    share = confidence.weights(labels[4000:], 3)
    for low in (0.0, 0.25, 0.5, 0.75):
        top = chances[:, :3].max(1)
        chosen = (top >= low) & (top < low + 0.25)
        right = chances[:, :3].argmax(1) == labels[4000:]
        expected = np.average(top[chosen], weights=share[chosen])
        assert np.average(right[chosen], weights=share[chosen]) == pytest.approx(expected, abs=0.05)


def test_the_threshold_is_the_best_one():
    rng = np.random.default_rng(3)
    for _ in range(10):
        n = int(rng.integers(6, 30))
        labels = np.concatenate([[0, 1, 2, 2], rng.integers(0, 3, n)])
        scores = rng.normal(size=(len(labels), 3)).round(1)  # some are equal
        found = calibrate(scores, labels)
        chances, share = found.probabilities(scores), confidence.weights(labels, 2)

        def right(threshold, found=found, chances=chances, share=share, labels=labels):
            one = Calibration(found.temperature, found.nobody, threshold, 0.0)
            return share[one.decisions(chances) == labels].sum()

        assert found.right == pytest.approx(right(found.threshold))
        assert found.right == pytest.approx(max(right(t) for t in [0, *chances[:, :-1].max(1), 1]))


def test_experts_and_nobody_weigh_half_each():
    share = confidence.weights(np.array([0, 0, 0, 1, 2]), 2)
    assert share.tolist() == pytest.approx([1 / 8] * 4 + [1 / 2])


def test_scores_that_separate_everything_stay_finite():
    labels = np.repeat([0, 1, 2], 5)
    found = calibrate(np.eye(3)[labels] * 9, labels)
    chances = found.probabilities(np.eye(3) * 9)
    assert np.isfinite(chances).all()
    assert found.right == 1
    assert found.decisions(chances).tolist() == [0, 1, 2]
    flat = calibrate(np.zeros((15, 3)), labels)
    assert np.isfinite(flat.probabilities(np.zeros((1, 3)))).all()


def test_every_question_is_scored_by_what_was_learnt_from_others():
    rows, labels = np.arange(23.0)[:, None], np.array([0] * 3 + [1] * 9 + [2] * 11)
    seen = []

    def learn(kept, kept_labels):
        assert set(kept_labels) == {0, 1, 2}
        seen.append(kept)
        return set(kept[:, 0])

    def score(learned, left):
        assert not learned & set(left[:, 0])
        return left.repeat(3, axis=1)

    found = confidence.held_out(rows, labels, learn, score)
    assert len(seen) == 3, "as many folds as the smallest group has questions"
    assert (found == rows).all()
