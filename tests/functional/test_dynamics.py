"""Forgetting curves: closed forms and limits, fits of exact points, and forecasts that hold what they promise."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from retain.errors import DataError
from retain.functional import dynamics

STEPS = np.arange(1, 11) * 10.0


def saturating(steps, ceiling=0.3, constant=60.0):
    return -ceiling * np.expm1(-np.asarray(steps, dtype=float) / constant)


def power(steps, scale=0.01, exponent=0.6):
    return scale * np.asarray(steps, dtype=float) ** exponent


CURVES = {"saturating": saturating, "power": power}


def test_sensitivity_falls_with_the_root_of_the_size_and_is_capped():
    assert [dynamics.sensitivity(p) for p in (1e6, 1e9, 4e9, 1e11)] == pytest.approx([1, 1, 0.5, 0.1])


def test_rate_is_the_product():
    rate = dynamics.loss_rate(4e9, intensity=2, similarity=0.25, base_rate=0.2)
    assert rate == pytest.approx(0.2 * 2 * 0.75 * 0.5)


def test_simulation_begins_with_the_rate_and_ends_at_the_ceiling():
    settings = {"parameters": 4e9, "intensity": 2, "similarity": 0.25, "base_rate": 0.2}
    lost = dynamics.simulate([0, 1e-6, 1, 3, 1e6], **settings, ceiling=0.6)
    assert lost[0] == 0
    assert lost[1] / 1e-6 == pytest.approx(dynamics.loss_rate(**settings), rel=1e-5)
    assert lost[2] == pytest.approx(0.6 * (1 - math.exp(-0.15 / 0.6)))
    assert lost[-1] == pytest.approx(0.6)
    assert (np.diff(lost) > 0).all()


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"parameters": 1e9}, {"parameters": 7e9}),
        ({"similarity": 0.1}, {"similarity": 0.9}),
        ({"intensity": 2}, {"intensity": 1}),
        ({"base_rate": 0.3}, {"base_rate": 0.1}),
        ({"ceiling": 1}, {"ceiling": 0.2}),
    ],
)
def test_what_makes_it_worse(more, less):
    a, b = (dynamics.simulate([0.5, 2], **{"parameters": 2e9} | kind) for kind in (more, less))
    assert (a > b).all()


def test_the_same_data_lose_nothing():
    assert (dynamics.simulate([1, 5], 1e9, similarity=1) == 0).all()


@pytest.mark.parametrize("law", dynamics.LAWS)
def test_exact_points_give_the_constants_back(law):
    found = dynamics.fit([0, *STEPS], [0, *CURVES[law](STEPS)], law=law)
    expected = {
        "saturating": {"ceiling": 0.3, "constant": 60, "slope": 0.005},
        "power": {"scale": 0.01, "step_exponent": 0.6},
    }[law]
    assert found.constants() == pytest.approx(expected, rel=1e-4)
    assert found.spread < 1e-6
    assert len(found.steps) == 10, "step 0 says nothing"
    assert found.at([5, 400]) == pytest.approx(CURVES[law]([5, 400]), rel=1e-4)
    ahead = dynamics.forecast(found, 300)
    assert ahead.value == pytest.approx(CURVES[law](300), rel=1e-4)
    assert ahead.high - ahead.low < 1e-4


@pytest.mark.parametrize("law", dynamics.LAWS)
def test_a_fit_is_scipys(law):
    rng = np.random.default_rng(0)
    error = rng.uniform(0.002, 0.01, 10)
    lost = CURVES[law](STEPS) + error * rng.normal(size=10)
    found = dynamics.fit(STEPS, lost, error, law)
    start = {"saturating": (0.3, 60), "power": (0.01, 0.6)}[law]
    best, _ = optimize.curve_fit(CURVES[law], STEPS, lost, p0=start, sigma=error)
    assert list(found.constants().values())[:2] == pytest.approx(best, rel=1e-3)
    # `spread` belongs to a look of mean squared error; curve_fit's scale to one of error 1
    residuals = (lost - CURVES[law](STEPS, *best)) / error
    assert found.spread == pytest.approx(math.sqrt((residuals**2).sum() / 8 * (error**2).mean()), rel=1e-4)


def test_a_run_that_gains_and_any_unit():
    lost = -50 * saturating(STEPS)
    found = dynamics.fit(STEPS, lost)
    assert found.at([100.0]) == pytest.approx(lost[-1:], rel=1e-4)
    assert dynamics.fit(STEPS, np.zeros(10)).at([5.0, 50.0]) == pytest.approx([0, 0])


def test_runs_with_different_trainable_parameters():
    rng = np.random.default_rng(1)
    steps, trainable = np.tile(STEPS, 3), np.repeat([1e6, 1e7, 1e8], 10)
    lost = 0.002 * steps**0.6 * trainable**0.05 * (1 + 0.01 * rng.normal(size=30))
    found = dynamics.fit(steps, lost, law="power", trainable=trainable)
    constants = found.constants()
    assert constants["step_exponent"] == pytest.approx(0.6, abs=0.03)
    assert constants["trainable_exponent"] == pytest.approx(0.05, abs=0.005)
    ahead = dynamics.forecast(found, 200, trainable=1e9)
    truth = 0.002 * 200**0.6 * 1e9**0.05
    assert ahead.low < truth < ahead.high
    assert ahead.high - ahead.low < 0.1 * truth
    # in logarithms the law is a plane
    plane = np.linalg.lstsq(np.stack([np.ones(30), np.log(steps), np.log(trainable)], 1), np.log(lost), rcond=None)[0]
    assert [constants["step_exponent"], constants["trainable_exponent"]] == pytest.approx(plane[1:], abs=0.01)
    alike = dynamics.fit(STEPS, power(STEPS), law="power", trainable=1e7)
    assert "trainable_exponent" not in alike.constants(), "one size says nothing about others"


def test_where_the_curve_is_a_line_the_interval_is_the_textbooks():
    """β known (a very narrow fit of the shape) leaves y = A·x: value ± t·s·√(1 + x²/Σx²)."""
    rng = np.random.default_rng(2)
    found = dynamics.fit(STEPS, power(STEPS) + 0.002 * rng.normal(size=10), law="power")
    x, there = (STEPS / 100) ** found.shape[0], 1.5 ** found.shape[0]
    residuals = found.forgetting - found.scale * x
    t = stats.t.ppf(0.975, 8)
    half = t * math.sqrt((residuals**2).sum() / 8 * (1 + there**2 / (x**2).sum()))
    ahead = dynamics.forecast(found, 150)
    assert ahead.high - ahead.value > half, "that the exponent was fitted, too, makes it wider"
    close = dynamics.forecast(found, 60)
    jacobian = np.stack([x, found.scale * x * np.log(STEPS / 100)], axis=1)
    row = np.array([0.6 ** found.shape[0], found.scale * 0.6 ** found.shape[0] * math.log(0.6)])
    leverage = row @ np.linalg.inv(jacobian.T @ jacobian) @ row
    assert (close.high - close.low) / 2 == pytest.approx(t * found.spread * math.sqrt(1 + leverage), rel=0.03)


def test_an_interval_widens_with_distance_and_confidence():
    rng = np.random.default_rng(3)
    found = dynamics.fit(STEPS, saturating(STEPS, constant=150) + 0.005 * rng.normal(size=10))
    widths = [f.high - f.low for f in (dynamics.forecast(found, step) for step in (60, 150, 300, 900))]
    assert widths == sorted(widths)
    sure = [f.high - f.low for f in (dynamics.forecast(found, 200, c) for c in (0.5, 0.9, 0.99))]
    assert sure == sorted(sure)
    assert dynamics.forecast(found, 1001).far
    assert not dynamics.forecast(found, 999).far


@pytest.mark.parametrize(
    ("law", "looks", "truth", "at"),
    [
        ("saturating", 8, {"constant": 100.0}, 200),
        ("power", 8, {"exponent": 0.6}, 200),
    ],
)
def test_forecasts_hold_what_comes_in_95_of_100(law, looks, truth, at):
    rng = np.random.default_rng(4)
    steps = np.linspace(100 / looks, 100, looks)
    curve, later = CURVES[law](steps, **truth), CURVES[law](at, **truth)
    held = 0
    for _ in range(1000):
        found = dynamics.fit(steps, curve + 0.005 * rng.normal(size=looks), law=law)
        ahead = dynamics.forecast(found, at)
        held += ahead.low <= later + 0.005 * rng.normal() <= ahead.high
    assert 0.93 <= held / 1000 <= 0.97


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: dynamics.fit([0, 10, 20, 30], [0, 1, 2, 3]), "3 after step 0"),
        (lambda: dynamics.fit([10, 10, 10, 10, 20], [1, 1, 1, 1, 2]), "2 after step 0"),
        (lambda: dynamics.fit([1, 2, 3, 4], [1, 2, 3]), "one of each"),
        (lambda: dynamics.fit([1, 2, 3, 4], [1, 2, 3, math.nan]), "not finite"),
        (lambda: dynamics.fit([-1, 2, 3, 4], [1, 2, 3, 4]), "below 0"),
        (lambda: dynamics.fit([1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 0, 1]), "not positive"),
        (lambda: dynamics.fit([1, 2, 3, 4], [1, 2, 3, 4], law="linear"), "saturating, power"),
        (lambda: dynamics.forecast(dynamics.fit(STEPS, saturating(STEPS)), 0), "step: 0"),
        (lambda: dynamics.forecast(dynamics.fit(STEPS, saturating(STEPS)), 5, 95), "between 0 and 1"),
        (lambda: dynamics.simulate([1], 0), "parameters: 0"),
        (lambda: dynamics.simulate([1], 1e9, similarity=40), "0 to 1"),
        (lambda: dynamics.simulate([1], 1e9, intensity=-1), "intensity: -1"),
        (lambda: dynamics.simulate([-1], 1e9), "epochs"),
        (lambda: dynamics.simulate([1], 1e9, ceiling=0), "ceiling: 0"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
