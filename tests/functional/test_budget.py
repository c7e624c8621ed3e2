"""The mathematics of a forgetting budget, against slow forms, closed forms, simulation and a convex toy."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from retain.errors import ConfigError, DataError
from retain.functional import budget
from retain.functional.budget import (
    Dual,
    drift_limit,
    items_needed,
    items_to_show,
    largest_inside,
    loss_bound,
    nats_bound,
    require_items,
    upper_of,
)

Z = float(stats.norm.ppf(0.95))
C = 0.5 - (Z * Z - 1) / 6


def answers(lost: int, gained: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-or-wrong scores before and after."""
    before, after = np.zeros(items), np.zeros(items)
    before[:lost], after[lost : lost + gained] = 1, 1
    return before, after


def bound(groups, confidence=0.95):
    """`loss_bound` of [(lost, gained, items), …]."""
    both = [answers(*group) for group in groups]
    labels = np.repeat(np.arange(len(groups)), [items for *_, items in groups])
    return loss_bound(np.concatenate([b for b, _ in both]), np.concatenate([a for _, a in both]), labels, confidence)


# -- the bound ----------------------------------------------------------------------------------------------
def test_where_nothing_changed_it_is_a_little_above_the_exact_bound():
    for items in (30, 100, 300, 3000):
        found = bound([(0, 0, items)])
        exact = 1 - 0.05 ** (1 / items)  # so many lost in truth, and none seen, once in twenty
        assert exact < found.upper < 1.1 * exact
        assert (found.value, found.low) == (0, -found.high)


def test_one_stratum_has_the_closed_form():
    """(ε − d̄ − c/n)² n = z² (m₂ + ε − d̄ − ε²), a quadratic in ε; with c = 0 and no change ε = z²/(n + z²)."""
    for lost, gained, items in ((0, 0, 50), (3, 1, 80), (1, 4, 60), (20, 12, 200), (30, 0, 40)):
        mean, square, n = (lost - gained) / items, (lost + gained) / items, items
        a = mean + C / n
        roots = np.roots([n + Z**2, -2 * n * a - Z**2, n * a * a - Z**2 * (square - mean)])
        assert bound([(lost, gained, items)]).upper == pytest.approx(float(roots.max()), rel=1e-9)


def slow(groups, confidence=0.95):
    """The bound by its definition: the largest standard error over all ways to spread a loss, by a general solver."""
    z = float(stats.norm.ppf(confidence))
    n = np.array([items for *_, items in groups], dtype=float)
    means = np.array([(lost - gained) / items for lost, gained, items in groups])
    squares = np.array([(lost + gained) / items for lost, gained, items in groups])
    step = max(0.0, 0.5 - (z * z - 1) / 6) / (len(n) * n.min())

    def gap(loss):
        def minus(x):
            return -float(((squares + x - means - x**2) / n).sum()) * 1e3

        total = {"type": "eq", "fun": lambda x: x.mean() - loss}
        begin = means + (1 - means) * (loss - means.mean()) / (1 - means.mean())
        limits = [(m, 1.0) for m in means]
        best = min(
            optimize.minimize(minus, start, bounds=limits, constraints=[total], method="SLSQP", tol=1e-14).fun
            for start in (begin, means + (loss - means.mean()))
        )
        return loss - means.mean() - step - z * math.sqrt(max(0.0, -best / 1e3)) / len(n)

    return optimize.brentq(gap, means.mean() + 1e-9, 1 - 1e-9, xtol=1e-9)


@pytest.mark.parametrize(
    "groups",
    [
        [(0, 0, 40), (0, 0, 40)],
        [(0, 0, 30), (2, 1, 100), (5, 5, 300)],
        [(1, 0, 35), (0, 3, 60), (4, 2, 50), (0, 0, 200)],
    ],
)
def test_several_strata_against_a_general_solver(groups):
    assert bound(groups).upper == pytest.approx(slow(groups), rel=1e-4)


def tango(lost, gained, items):
    """Tango (1998): the variance at the constrained maximum of the likelihood, found here by search."""

    def gap(loss):
        def minus(p01):  # gained; lost is p01 + loss
            parts = [(lost, p01 + loss), (gained, p01), (items - lost - gained, 1 - 2 * p01 - loss)]
            return -sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

        most = (1 - loss) / 2
        best = optimize.minimize_scalar(minus, bounds=(0, most), method="bounded", options={"xatol": 1e-12}).x
        return loss - (lost - gained) / items - Z * math.sqrt((2 * best + loss - loss**2) / items)

    return optimize.brentq(gap, (lost - gained) / items + 1e-6, 0.9)


def test_it_is_a_little_above_tangos_own():
    for lost, gained, items in ((0, 0, 50), (2, 2, 60), (5, 1, 100), (12, 9, 150)):
        theirs, ours, mean = tango(lost, gained, items), bound([(lost, gained, items)]).upper, (lost - gained) / items
        assert theirs < ours < theirs + 2.5 * C / items + 0.25 * (theirs - mean)


@pytest.mark.parametrize("sizes", [[30], [300], [30, 300], [30] * 10, [30, 60, 100, 150, 300]])
def test_the_truth_is_above_it_no_more_often_than_said(sizes):
    """Right-or-wrong items, of which 0.5 % to 20 % flip, evenly or on the smallest probe alone, all or half of them
    lost."""
    rng, runs, n = np.random.default_rng(0), 250, np.array(sizes)
    for flips in (0.005, 0.05, 0.2):
        for lost in (0.5, 1.0):
            for share in (np.full(len(n), flips), np.where(np.arange(len(n)) == n.argmin(), flips, 0.0)):
                changed = rng.binomial(n, share, size=(runs, len(n)))
                worse = rng.binomial(changed, lost)
                kinds, counts = np.unique(np.concatenate([changed, worse], 1), axis=0, return_counts=True)
                truth, held = float((share * (2 * lost - 1)).mean()), 0
                for kind, count in zip(kinds, counts):
                    seen, of_them = kind[: len(n)] / n, kind[len(n) :] / n
                    held += count * (upper_of(2 * of_them - seen, seen, n, 0.95) >= truth)
                assert held / runs > 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs), (flips, lost, share)


def test_graded_scores_are_held_too():
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        before = rng.beta(4, 2, 60)
        after = np.clip(before - (rng.random(60) < 0.1) * rng.random(60), 0, 1)
        held += (
            loss_bound(before, after, np.zeros(60)).upper >= 0.1 * 3 / 7
        )  # E[min(u, b)] = E[b − b²/2], b ~ Beta(4, 2)
    assert held / 300 > 0.92


def test_a_loss_mirrored_is_a_gain_mirrored():
    one, other = bound([(5, 2, 60), (0, 1, 40)]), bound([(2, 5, 60), (1, 0, 40)])
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.low < one.value < one.upper < one.high


def test_wider_than_student_where_much_changed():
    rng = np.random.default_rng(2)
    d = rng.choice([-1, 0, 1], 200, p=[0.1, 0.75, 0.15])
    found = loss_bound(np.clip(d, 0, 1), np.clip(-d, 0, 1), np.zeros(200)).upper
    student = d.mean() + stats.t.ppf(0.95, 199) * d.std(ddof=1) / math.sqrt(200)
    assert student < found < student + 0.01


def test_everything_lost():
    assert bound([(40, 0, 40)]).upper == 1


@pytest.mark.parametrize("before", [[], [0.5, 1.2], [0.1, math.nan]])
def test_scores_must_be_scores(before):
    with pytest.raises(DataError, match="between 0 and 1"):
        loss_bound(before, before, np.zeros(len(before)))
    with pytest.raises(DataError, match="strata"):
        loss_bound([1, 0], [1, 0], [0])


def test_nats_are_bounded_one_sided():
    rng = np.random.default_rng(0)
    losses, weights = [rng.normal(0.02, 0.1, 80), rng.normal(0.0, 0.1, 50)], [rng.integers(5, 60, 80), None]
    found = nats_bound(losses, weights, 0.95)
    value = (np.average(losses[0], weights=weights[0]) + losses[1].mean()) / 2
    assert found.value == pytest.approx(value)
    error = math.sqrt(0.1**2 * (np.sum(weights[0] ** 2) / weights[0].sum() ** 2 + 1 / 50)) / 2
    assert found.upper == pytest.approx(value + Z * error, abs=0.004)
    assert found.low < value < found.upper < found.high


# -- sample sizes -------------------------------------------------------------------------------------------
def test_items_needed_are_enough_and_no_more():
    for limit in (0.01, 0.02, 0.1):
        needed = items_needed(limit)
        assert bound([(0, 0, needed)]).upper <= limit < bound([(0, 0, needed - 1)]).upper
        assert items_needed(limit, strata=[1, 1, 1]) in range(needed, needed + 4)
        assert items_needed(limit, strata=[1, 9]) > 2 * needed  # all may be lost on the small one
    assert items_needed(0.01) < 310.5  # about the rule of three


def test_items_needed_have_the_power_that_they_promise():
    items = items_needed(0.05, discordance=0.05)
    rng = np.random.default_rng(0)
    changed = rng.binomial(items, 0.05, 500)
    lost = rng.binomial(changed, 0.5)
    shown = [upper_of([(2 * a - b) / items], [b / items], [items], 0.95) <= 0.05 for a, b in zip(lost, changed)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.05)
    assert items > items_needed(0.05)
    with pytest.raises(DataError, match="limit"):
        items_needed(0.0)


def test_too_few_items_are_refused_with_the_number():
    with pytest.raises(ConfigError, match=r"60 items \(2 probes\).*1.00%.*31\d are needed"):
        require_items(0.01, 0.95, [30, 30])
    with pytest.raises(ConfigError, match=r"or 31\d if all probes are of one size"):
        require_items(0.01, 0.95, [10, 400])
    require_items(0.01, 0.95, [400])
    require_items(0.01, 0.95, [])


def test_items_to_show():
    means, squares, counts = np.array([0.005, 0.0]), np.array([0.02, 0.01]), np.array([100.0, 150.0])
    items = items_to_show(means, squares, counts, 0.01)
    assert items > 250
    assert upper_of(means, squares, counts * items / 250, 0.95) == pytest.approx(0.01, rel=1e-3)
    assert items_to_show(means + 0.02, squares, counts, 0.01) is None


# -- the controller -----------------------------------------------------------------------------------------
def settled(limit, gain=0.5, least=1 / 64, most=64.0, looks=200, pull=0.3):
    """Gradient descent on ½ (θ − 1)² + factor · ½ θ², with a look every step; drift ½ θ². The factor, and the drift."""
    dual = Dual(gain, least, most)
    state, theta = dual.begin(), 0.0
    for _ in range(looks):
        for _ in range(5):
            theta -= pull / (1 + state["factor"]) * ((theta - 1) + state["factor"] * theta)
        state = dual.update(state, theta**2 / 2, limit)
        assert least <= state["factor"] <= most
    return state["factor"], theta**2 / 2


def test_the_factor_is_the_multiplier_of_karush_kuhn_and_tucker():
    for limit in (0.01, 0.03, 0.125, 0.3):
        factor, drift = settled(limit)
        assert drift == pytest.approx(limit, rel=1e-3)
        assert factor == pytest.approx(1 / math.sqrt(2 * limit) - 1, rel=1e-2)  # θ = 1 / (1 + factor)


def test_slack_and_impossible_limits_end_at_the_bounds():
    assert settled(10.0)[0] == 1 / 64
    assert settled(1e-9)[0] == 64


def test_a_looser_limit_never_ends_stronger():
    found = [settled(limit)[0] for limit in (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512)]
    assert found == sorted(found, reverse=True)


def test_nothing_winds_up_at_a_bound():
    dual = Dual(0.5, 0.125, 8.0)
    state = dual.begin()
    for _ in range(1000):
        state = dual.update(state, 5.0, 0.1)
    assert state["factor"] == 8
    for _ in range(8):  # the smoothed drift halves
        state = dual.update(state, 0.0, 0.1)
    assert state["factor"] < 8


def test_a_state_that_was_written_down_goes_on_as_if_nothing_had_been():
    import json

    drifts, dual = np.random.default_rng(0).random(40), Dual()
    state = again = dual.begin()
    for drift in drifts:
        state = dual.update(state, drift, 0.4)
        again = json.loads(json.dumps(dual.update(again, drift, 0.4)))
    assert state == again


def test_begins_inside_its_bounds():
    assert Dual(0.5, 0.5, 1.0).begin()["factor"] == 1
    assert Dual(0.5, 1.0, 8.0).begin()["factor"] == 1


# -- from points to nats ------------------------------------------------------------------------------------
def test_the_drift_that_is_allowed():
    assert drift_limit(0.02) == pytest.approx(0.02 / budget.PRIOR)
    seen = [(0.5, 0.05, 0.0), (1.0, 0.1, 0.0), (0.7, 0.07, 0.0)]  # a tenth per nat, at drifts that tell much
    assert drift_limit(0.02, seen) == pytest.approx(0.2, rel=0.01)
    assert drift_limit(0.02, [(0.04, 0.02, 0.0)]) == pytest.approx(0.04)  # what the prior says
    assert drift_limit(0.02, [(0.001, 0.9, 0.01)]) > 0.035  # a look at hardly any drift says little, unless it is sure
    assert drift_limit(0.02, [(5.0, -0.3, -0.4)]) == pytest.approx(0.4, rel=0.01)  # a gain: ten times the prior at most
    assert drift_limit(0.04, seen) > drift_limit(0.02, seen)


def test_a_look_that_surely_lost_too_much_lowers_the_limit_below_its_drift():
    """However little the drift was: the texts may not show what is being lost."""
    sure = (0.0006, 0.42, 0.36)
    assert drift_limit(0.03, [sure]) == pytest.approx(0.0006 * 0.03 / 0.36)
    assert drift_limit(0.03, [sure, (0.0004, 0.3, 0.25)]) == pytest.approx(0.0004 * 0.03 / 0.25)  # the lowest
    assert drift_limit(0.03, [sure, (0.0004, 0.02, -0.01)]) == pytest.approx(0.03 / budget.PRIOR, rel=0.01)  # disproved
    assert drift_limit(0.03, [sure, (0.00001, 0.0, -0.02)]) == pytest.approx(0.0006 * 0.03 / 0.36)  # says nothing
    assert drift_limit(0.03, [sure, (0.0004, 0.05, -0.01)]) == pytest.approx(0.0006 * 0.03 / 0.36)


# -- the search ---------------------------------------------------------------------------------------------
class At:
    def __init__(self, share, inside):
        self.share, self.inside = share, inside


def search(edge, tries, **more):
    asked = []

    def ask(share):
        asked.append(share)
        return At(share, share <= edge)

    share, points = largest_inside(ask, tries, **more)
    assert [p.share for p in points] == asked
    assert len(asked) <= tries
    return share, asked


def test_the_end_is_asked_first_and_the_start_never():
    assert search(1.0, 6) == (1.0, [1.0])
    share, asked = search(0.0, 6)
    assert share == 0
    assert min(asked) > 0


def test_the_edge_is_found_from_below():
    for edge in np.linspace(0.03, 0.97, 11):
        share, asked = search(edge, 8)
        assert 0 <= edge - share <= 0.5**7
        assert all(one < outside for one in asked for outside in asked[: asked.index(one)] if outside > edge)


def test_a_good_guess_saves_tries():
    share, asked = search(0.4, 3, guess=lambda end: 0.4)
    assert (share, asked) == (0.4, [1.0, 0.4, 0.7])
    assert search(0.4, 1) == (0.0, [1.0])
    assert search(0.4, 2, guess=lambda end: 7.0)[1] == [1.0, 0.95]


def test_no_share_above_one_that_failed_is_chosen():
    """Also where the loss does not rise with the share."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        share, points = largest_inside(lambda share: At(share, bool(rng.random() < 0.5)), 6)
        assert all(p.share > share for p in points if not p.inside)
