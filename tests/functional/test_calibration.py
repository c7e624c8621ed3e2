"""Calibration against scikit-learn, a slow form written out, and models whose calibration is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from retain.errors import DataError
from retain.functional import calibration


def items(size=398, options=4, seed=0, sharp=2.0):
    """Log-likelihoods [size, options], and the right options: likelier ones are right more often.

    A size of a prime and one: no quantile is one of the values, where rounding decides about the bin.
    """
    rng = np.random.default_rng(seed)
    values = sharp * rng.normal(size=(size, options)) - 20
    answers = [int(rng.choice(options, p=softmax(0.6 * row))) for row in values]
    return values, answers


def slow_error(confidence, right, bins):
    """The definition, bin by bin: those above the lower edge and up to the upper one."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0)]
        if inside:
            hits = sum(right[i] for i in inside) / len(inside)
            sure = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(hits - sure)
    return total


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_error_is_the_slow_form_and_that_of_scikit_learn(bins):
    confidence, right, _ = calibration.confidences(*items())
    found = calibration.calibration_error(confidence, right, bins)
    assert found == pytest.approx(slow_error(confidence, right, bins), abs=1e-12)
    for adaptive, strategy in ((False, "uniform"), (True, "quantile")):
        hits, sure = calibration_curve(right, confidence, n_bins=bins, strategy=strategy)
        counts = np.bincount(calibration.bin_of(confidence, bins, adaptive), minlength=bins)
        expected = (counts[counts > 0] / len(confidence) * np.abs(hits - sure)).sum()
        assert calibration.calibration_error(confidence, right, bins, adaptive) == pytest.approx(expected, abs=1e-12)


def test_adaptive_bins_hold_equally_many():
    confidence, _, _ = calibration.confidences(*items(size=450))
    assert set(np.bincount(calibration.bin_of(confidence, 15, adaptive=True))) <= {29, 30, 31}


def test_edges_belong_to_the_bin_below():
    assert calibration.bin_of([0.0, 0.2, 0.21, 0.4, 1.0], 5).tolist() == [0, 0, 1, 1, 4]


@pytest.mark.parametrize("options", [2, 3, 5])
def test_brier_is_that_of_scikit_learn(options):
    values, answers = items(60, options)
    _, _, found = calibration.confidences(values, answers)
    p = softmax(values, axis=1)
    if options == 2:
        expected = brier_score_loss(answers, p[:, 1], scale_by_half=False)
    else:
        expected = brier_score_loss(answers, p, labels=list(range(options)), scale_by_half=False)
    assert found.mean() == pytest.approx(expected, abs=1e-12)


def test_a_calibrated_model_has_a_small_error_and_a_sure_one_a_large_one():
    rng = np.random.default_rng(3)
    confidence = rng.uniform(0.3, 1, 20_000)
    right = rng.random(20_000) < confidence
    assert calibration.calibration_error(confidence, right) < 0.02
    assert calibration.calibration_error(np.ones(100), np.arange(100) % 4 == 0) == pytest.approx(0.75)


def test_log_likelihoods_far_below_zero_still_make_probabilities():
    p = calibration.option_probabilities([-2000.0, -2000.0 + math.log(3)])
    assert p == pytest.approx([0.25, 0.75])


def test_change_has_an_interval_around_it():
    values, answers = items(200)
    old = calibration.confidences(values, answers)[:2]
    new = calibration.confidences(3 * values, answers)[:2]  # the same choices, surer
    found = calibration.calibration_change(old, new)
    errors = [calibration.calibration_error(*side) for side in (old, new)]
    assert found.value == pytest.approx(errors[1] - errors[0])
    assert 0 < found.low < found.value < found.high
    same = calibration.calibration_change(old, old)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    back = calibration.calibration_change(new, old)
    assert back.value == pytest.approx(-found.value)


def test_intervals_cover_the_true_change():
    """One model says 0.15 too little, the other 0.25 too much: with one bin the true change is 0.1."""
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rng.uniform(0.3, 0.7, 200)
        first, second = (rng.random((2, 200)) < truth).astype(float)
        found = calibration.calibration_change((truth - 0.15, first), (truth + 0.25, second), 0.9, bins=1, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert covered in range(31, 41)  # 36 expected, standard deviation 1.9


@pytest.mark.parametrize(
    ("confidence", "bins", "says"),
    [([0.5], 0, "0 bins"), ([], 15, "shape"), ([1.2], 15, "between 0 and 1"), ([math.nan], 15, "between 0 and 1")],
)
def test_mistakes(confidence, bins, says):
    with pytest.raises(DataError, match=says):
        calibration.calibration_error(confidence, [1.0] * len(confidence), bins)


def test_other_items_after_are_refused():
    with pytest.raises(DataError, match="2 items before, 3 after"):
        calibration.calibration_change(([0.5] * 2, [1, 0]), ([0.5] * 3, [1, 0, 1]))
