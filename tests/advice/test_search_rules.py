"""When a trial is ended early, which one is recommended, and how much was saved."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from retain.advice.pruning import Point, beaten_by, behind, looks_count
from retain.advice.search import Search, Units, following
from retain.advice.search_result import choose, over_runs, saved
from retain.advice.search_study import sampler
from retain.config import parse
from retain.report.search import Tried, beaten, on_front
from retain.results import Estimate

POINTS = Units("points", "points")


def about(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def tried(number: int, learned: float, lost: float, **more) -> Tried:
    given = {"values": {}, "state": "finished", "steps": 100} | more
    return Tried(number=number, learned=about(learned), lost=about(lost), **given)


def point(learned: float, lost: float, half: float = 0.05) -> Point:
    return Point(about(learned, half), about(lost, half), 10)


@pytest.mark.parametrize(
    ("mine", "theirs", "hopeless"),
    [
        (point(0.2, 0.5), point(0.6, 0.1), True),
        (point(0.2, 0.5, 0.25), point(0.6, 0.1, 0.25), False),  # the same, with fewer items: may be chance
        (point(0.2, 0.1), point(0.6, 0.5), False),  # learned less, and lost less
        (point(0.7, 0.5), point(0.6, 0.1), False),  # lost more, and learned more
        (point(0.2, 0.15), point(0.6, 0.1), False),  # the loss alone may be chance
        (point(0.55, 0.5), point(0.6, 0.1), False),  # the gain alone may be chance
    ],
)
def test_hopeless_is_behind_in_both_beyond_doubt(mine, theirs, hopeless):
    assert behind(mine, theirs) == hopeless
    assert beaten_by(mine, [(3, None), (4, theirs)]) == (4 if hopeless else None)


def test_equal_trials_are_hardly_ever_ended():
    """Two runs with one truth, 60 items each: their intervals at 95 % must not end one more often than 1 in 400."""
    rng = np.random.default_rng(0)

    def drawn() -> Point:
        numbers = []
        for share in (0.5, 0.3):
            mean = rng.binomial(60, share) / 60
            half = 1.96 * np.sqrt(mean * (1 - mean) / 60)
            numbers.append(Estimate(value=mean, low=mean - half, high=mean + half))
        return Point(*numbers, 10)

    assert np.mean([behind(drawn(), drawn()) for _ in range(4000)]) < 1 / 400


def test_looks_do_not_count_where_the_weights_move_afterwards():
    def config(**more):
        return parse({"tasks": ["new.jsonl"], "methods": ["l2sp"]} | more)

    assert looks_count(config())
    assert not looks_count(config(methods=["l2sp", "interpolate"]))
    assert looks_count(config(methods=["l2sp", {"interpolate": {"strength": 0}}]))
    assert not looks_count(config(budget=0.02))


def test_the_front_is_what_nothing_beats_not_even_the_base():
    trials = [
        tried(0, 0.5, 0.2),
        tried(1, 0.4, 0.3),
        tried(2, 0.7, 0.4),
        tried(3, -0.1, 0.1),
        tried(4, 0.9, 0.1, state="hopeless"),
    ]
    assert [t.number for t in on_front(trials)] == [0, 2]


def test_the_recommended_trial():
    trials = [tried(0, 0.50, 0.20), tried(1, 0.49, 0.10), tried(2, 0.40, 0.01), tried(3, 0.2, 0.0)]
    assert choose(trials)[0].number == 1, "98 % of the most, and half the loss"
    assert choose(trials, 0.02)[0].number == 2
    assert choose(trials, 0.2)[0].number == 0
    assert choose(trials)[1] == "rule_share"
    assert choose(trials, 0.02)[1] == "rule_limit"
    over, rule = choose([tried(0, 0.5, 0.2), tried(1, 0.4, 0.1)], 0.02)
    assert over.number == 1
    assert rule == "rule_over"
    assert choose([tried(0, -0.2, 0.0), tried(1, -0.1, 0.3)])[0].number == 1
    assert choose([tried(0, 0.5, 0.1, state="failed")]) is None


@pytest.mark.parametrize(
    ("weights", "best"),
    [
        ((0.6, 0.4), 1),  # 0.196 − 0.06, against 0.2 − 0.12 and 0.16 − 0.072
        ((0.0, 1.0), 0),
        ((0.9, 0.1), 2),  # number 3 lost nothing, but learned less than half of the most
        ((1.0, 0.0), 2),
    ],
)
def test_the_best_balance_of_those_that_learned_something(weights, best):
    trials = [tried(0, 0.50, 0.20), tried(1, 0.49, 0.10), tried(2, 0.40, 0.08), tried(3, 0.2, 0.0)]
    chosen, rule = choose(trials, weights=weights)
    assert (chosen.number, rule) == (best, "rule_balance")


def test_steps_that_were_saved():
    trials = [tried(0, 0, 0), tried(1, 0, 0, steps=80), tried(2, 0, 0, steps=30, state="hopeless")]
    trials.append(tried(3, 0, 0, steps=10, state="failed"))
    assert saved(trials) == pytest.approx((90 - 30) / (3 * 90))
    assert saved([trials[2]]) is None


def test_who_is_beaten_is_never_recommended():
    draw = np.random.default_rng(0)
    for _ in range(200):
        trials = [tried(i, *pair) for i, pair in enumerate(draw.integers(-2, 5, (6, 2)) / 5)]
        gone = {t.number for t in beaten(trials)}
        assert len(gone) < len(trials)
        for limit, weights in ((None, None), (0.0, None), (0.3, None), (None, (0.6, 0.4)), (None, (1.0, 0.0))):
            chosen = choose(trials, limit, weights)
            assert chosen is not None
            assert chosen[0].number not in gone
    assert [t.number for t in beaten([tried(0, 0.5, 0.1), tried(1, 0.5, 0.2), tried(2, 0.5, 0.1)])] == [1]


def test_raising_stops_where_enough_is_kept_or_too_little_is_learned(tmp_path):
    config = parse(
        {"tasks": ["new.jsonl"], "methods": [{"l2sp": {"strength": 0.3}}, {"interpolate": {"strength": 0.1}}]}
    )
    search = Search(config, [], tmp_path, "raise", lose_at_most=0.05, learn_at_least=0.3)

    def after(*numbers: tuple[float, float]) -> float | None:
        found = [tried(i, *pair, values={"factor": 2.0**i}) for i, pair in enumerate(numbers)]
        return following(search, POINTS, found)

    assert after() == 1
    assert after((0.9, 0.4)) == 2
    assert after((0.9, 0.4), (0.8, 0.2)) == 4
    assert after((0.9, 0.4), (0.8, 0.05)) is None
    assert after((0.9, 0.4), (0.2, 0.2)) is None
    assert after(*[(0.9, 0.4)] * 8) is None, "no end of trials"
    assert search.of({"factor": 4.0}).methods == [{"l2sp": {"strength": 1.2}}, {"interpolate": {"strength": 0.1}}]


def test_a_grid_that_is_cut_is_drawn_from_all_over(tmp_path):
    from retain.advice.search_space import read_over

    config = parse({"tasks": ["new.jsonl"], "methods": ["l2sp"]})
    over = read_over(["methods.l2sp.strength=0.01..1:log", "train.learning_rate=1e-5,1e-4"], config)
    whole = Search(config, over, tmp_path, "grid", points=3).grid()
    assert len(whole) == 6
    some = Search(config, over, tmp_path, "grid", trials=3, points=3).grid()
    assert len(some) == 3
    assert all(point in whole for point in some)
    assert some == Search(config, over, tmp_path, "grid", trials=3, points=3).grid()


def test_the_interval_over_runs_is_students():
    values = [0.4, 0.5, 0.9, 0.3]
    found = over_runs(values, 0.9)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("mode", ["tpe", "random"])
def test_values_follow_from_seed_number_and_history(mode):
    import optuna

    def values(seed: int) -> list[float]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(directions=["maximize", "minimize"])
        found = []
        for number in range(14):
            study.sampler = sampler(mode, seed, number)
            trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
            found.append(trial.params["x"])
            study.tell(trial, (found[-1], found[-1] ** 2))
        return found

    first = values(0)
    assert first == values(0)
    assert first != values(1)
    assert len(set(first)) == 14


def test_two_objectives_are_searched_where_they_are_good():
    """On a front that is known, TPE's later trials lie nearer to it than trials at random."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def off(mode: str, seed: int) -> float:
        study = optuna.create_study(directions=["maximize", "minimize"])
        space = {name: optuna.distributions.FloatDistribution(0, 1) for name in "abc"}
        far = []
        for number in range(40):
            study.sampler = sampler(mode, seed, number)
            trial = study.ask(space)
            a, b, c = (trial.params[name] for name in "abc")
            far.append(abs(b - 0.3) + abs(c - 0.7))  # 0 on the front, wherever a is
            study.tell(trial, (a - far[-1], a + far[-1]))
        return float(np.mean(far[20:]))

    assert np.mean([off("tpe", s) for s in range(4)]) < 0.75 * np.mean([off("random", s) for s in range(4)])
