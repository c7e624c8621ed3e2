"""Alarms need looks in a row, a raise has a cap, the best look is the best; and what stands for a new-task score."""

import pytest

from retain.config import MonitorConfig
from retain.training.reactions import Standing, decide, loss_gain, numbers_of


def go(settings, forgetting, scores=None, standing=None):
    """The decisions of a row of looks, ten steps apart."""
    standing = standing or Standing()
    scores = scores or [1 - f for f in forgetting]
    made = [
        decide(settings, standing, 10 * (i + 1), f, s, {"facts": f, "sums": 0.0})
        for i, (f, s) in enumerate(zip(forgetting, scores, strict=True))
    ]
    return made, standing


def test_one_look_is_no_alarm():
    made, standing = go(MonitorConfig(), [0.4, 0.1, 0.31, 0.35, 0.5, 0.3, 0.4])
    assert [one.did for one in made] == [(), (), (), ("warn",), ("warn",), (), ()]
    assert standing.above == 1  # exactly the threshold is not above it
    assert made[3].say[0].startswith("step 40: 35% of old abilities forgotten (above 30%), most: facts 35%")
    assert "sums" not in made[3].say[0]
    assert go(MonitorConfig(patience=1), [0.4])[0][0].did == ("warn",)


def test_stop_and_restore():
    (_, _, last), standing = go(MonitorConfig(action="stop"), [0.2, 0.4, 0.4])
    assert last.stop
    assert not last.restore
    assert standing.stopped
    made, _ = go(MonitorConfig(action="restore"), [0.2, 0.4, 0.4], [0.5, 0.7, 0.6])
    assert [one.keep for one in made] == [True, True, False]
    assert made[-1].did == ("stop", "restore")
    assert "step 20 are put back" in made[-1].say[-1]
    best_at_the_end, _ = go(MonitorConfig(action="restore"), [0.4, 0.4], [0.5, 0.6])
    assert best_at_the_end[-1].did == ("stop",)


def test_raise_waits_and_has_a_cap():
    settings = MonitorConfig(action="raise", raised="ewc", factor=3, most=5)
    made, standing = go(settings, [0.5] * 7)
    assert [one.factor for one in made] == [None, 3.0, None, 5.0, None, None, None]
    assert [one.did for one in made][5:] == [("warn",), ("warn",)]
    assert "largest factor (5)" in made[5].say[0]
    assert standing.factor == 5
    assert not any(one.stop for one in made)


def test_early_stop_counts_looks_without_a_better_score():
    made, standing = go(MonitorConfig(early_stop=2), [0.0] * 6, [0.5, 0.6, 0.6, 0.7, 0.69, 0.7])
    assert [one.stop for one in made] == [False] * 5 + [True]
    assert (standing.best, standing.best_step) == (0.7, 40)
    assert made[-1].say == ("step 60: no better efficiency than 0.700 at step 40 in 2 looks; training stops.",)


def test_a_standing_comes_back_from_a_record():
    _, standing = go(MonitorConfig(action="raise", raised="ewc"), [0.5] * 3)
    assert Standing.of({"standing": vars(standing).copy()}) == standing
    assert Standing.of(None) == Standing()
    one, first = go(MonitorConfig(), [0.4])
    two, _ = go(MonitorConfig(), [0.4], standing=Standing.of({"standing": vars(first).copy()}))
    assert not one[0].did
    assert two[0].did == ("warn",)


def test_a_loss_stands_for_what_was_learned():
    training = [{"loss": 4.0, "step": 1}, {"loss": 3.0, "step": 2}, {"loss": 2.0, "step": 3}, {"loss": 1.0, "step": 4}]
    assert loss_gain([], 0) == 0
    assert loss_gain(training, 2) == pytest.approx((4 - 1.5) / 4)
    assert loss_gain(training, 9) == pytest.approx(0.75)
    evaluated = [*training, {"eval_loss": 2.0, "step": 2}, {"eval_loss": 3.0, "step": 4}]
    assert loss_gain(evaluated, 0) == pytest.approx(-0.5)
    assert loss_gain(evaluated[:5], 2) == pytest.approx((4 - 1.5) / 4)  # one evaluation has nothing to fall from


def test_numbers_for_trackers():
    record = {
        "kl": {"value": 0.25},
        "loss": 2.0,
        "forgetting": {"value": 0.1},
        "score": 0.6,
        "probes": {
            "facts": {"role": "reference", "forgetting": 0.2, "retention": 80.0, "score": {"value": 0.4}},
            "new": {"role": "task", "forgetting": 0.0, "retention": 100.0, "score": {"value": 0.9}},
        },
        "standing": {"factor": 2.0},
    }
    assert numbers_of(record) == {
        "drift/kl": 0.25,
        "drift/loss": 2.0,
        "forgetting/overall": 0.1,
        "monitor/score": 0.6,
        "forgetting/facts": 0.2,
        "kept/facts": 80.0,
        "learned/new": 0.9,
        "monitor/factor": 2.0,
    }
