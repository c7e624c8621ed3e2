"""The order of a task's rows: blocks of replay in optimizer steps, planned once for every resume and every rank."""

import numpy as np
import pytest

from retain.data.mixture import MixtureSampler
from retain.functional.sampling import schedule
from retain.functional.sources import Sources

NEW, OLD, WINDOW = 120, 10, 8


def sampler(share=0.25, epochs=1, kind="constant", seed=3, **settings):
    fraction = schedule(kind, share)
    return MixtureSampler(np.ones(NEW), np.ones(OLD), fraction, "rows", WINDOW, epochs, seed, **settings)


def steps(made):
    """Rows of every optimizer step of the planned run."""
    rows = np.concatenate([made.plan(epoch) for epoch in range(made.epochs)])
    return [rows[i : i + WINDOW].tolist() for i in range(0, len(rows), WINDOW)]


def replayed(made):
    return [sum(row >= NEW for row in step) for step in steps(made)]


def test_a_block_ends_every_period_and_the_share_stays():
    plain, blocks = sampler(), sampler(every=4)
    assert replayed(plain) == [2] * 20
    assert replayed(blocks) == [0, 0, 0, 8] * 5
    assert sorted(blocks.plan(0)) == sorted(plain.plan(0))
    new = [row for step in steps(blocks) for row in step if row < NEW]
    assert sorted(new) == list(range(NEW))


def test_some_of_the_replay_stays_in_every_step():
    found = replayed(sampler(0.25, every=8, spread=0.5))
    assert sum(found) == sum(replayed(sampler(0.25)))
    assert all(found[i] == 8 for i in (7, 15)), "a whole step of replay ends a period"
    for begin in (0, 8):  # 16 of 64 rows are replay: 8 in the block, 8 before it
        assert sum(found[begin : begin + 7]) == 8
        assert max(found[begin : begin + 7]) <= 3
        assert min(found[begin : begin + 7]) >= 1, "a step without replay"


def test_blocks_go_on_from_epoch_to_epoch():
    """Every 6 steps of the run, though an epoch has 20."""
    found = replayed(sampler(epochs=3, every=6))
    assert len(found) == 60
    per_period = [found[i : i + 6] for i in range(0, 60, 6)]
    assert per_period == [[0, 0, 0, 0, 4, 8]] * 10
    counts = np.bincount(sampler(epochs=3, every=6).shown(60), minlength=NEW + OLD)
    assert set(counts[:NEW]) == {3}
    assert set(counts[NEW:]) == {12}, "120 places for 10 rows: in equal numbers"


def test_a_moving_share_moves_the_blocks():
    found = replayed(sampler(kind="rising", share=None, epochs=2, every=5))
    periods = [sum(found[i : i + 5]) for i in range(0, len(found) - 5, 5)]
    assert periods[0] < periods[-1]
    assert periods == sorted(periods)
    assert periods[0] == pytest.approx(0.15 * 40, abs=1.5)
    assert sum(found) == sum(replayed(sampler(kind="rising", share=None, epochs=2)))


@pytest.mark.parametrize("settings", [{}, {"every": 4}, {"every": 7, "spread": 0.3}])
def test_the_order_is_a_function_of_the_seed(settings):
    assert steps(sampler(epochs=2, **settings)) == steps(sampler(epochs=2, **settings))
    assert steps(sampler(epochs=2, seed=4, **settings)) != steps(sampler(epochs=2, **settings))
    made = sampler(epochs=2, **settings)
    shown = np.concatenate([made.plan(0), made.plan(1)])
    assert np.array_equal(made.shown(23), shown[: 23 * WINDOW])


@pytest.mark.parametrize("kind", ["constant", "linear", "annealed"])
def test_planned_steps_are_the_length_of_a_schedule(kind):
    """`max_steps` says when progress is 1, whatever part of the new rows is shown by then."""
    fraction = schedule(kind, 0.15)
    for number in (7, 40, 55):
        made = sampler(0.15, epochs=99, kind=kind, steps=number)
        shown = made.shown(number) >= NEW
        assert len(shown) == number * WINDOW
        integral = np.mean([fraction((i + 0.5) / 1000) for i in range(1000)])
        assert shown.mean() == pytest.approx(integral, abs=4.5 / len(shown))
        late = shown[round(0.8 * len(shown)) :].mean()
        wanted = np.mean([fraction(0.8 + 0.2 * (i + 0.5) / 1000) for i in range(1000)])
        assert late == pytest.approx(wanted, abs=8 / (0.2 * len(shown))), "a window's shuffle may reach over the line"


def test_windows_are_those_of_the_optimizer_where_epochs_differ_in_length():
    made = MixtureSampler(np.ones(26), np.ones(5), lambda t: 0.25, "rows", 8, 3, 0)
    rows = np.concatenate([made.plan(epoch) for epoch in range(3)])
    assert len(rows) == 104
    found = [int((rows[i : i + 8] >= 26).sum()) for i in range(0, 104, 8)]
    assert set(found) <= {1, 2, 3}
    assert sum(found) == 26


def test_shares_by_source_hold_in_blocks_too():
    origin = np.repeat([0, 1], [2, 8])
    sources = Sources(("a", "b"), origin, (3.0, 1.0), float("inf"))
    made = sampler(every=4, sources=sources)
    rows = made.shown(20) - NEW
    assert np.bincount(origin[rows[rows >= 0]]).tolist() == [30, 10]


def test_a_raised_share_begins_at_its_step_and_has_a_cap():
    made, plain = sampler(epochs=2), sampler(epochs=2)
    made.raise_share(5, 2.0)
    made.raise_share(30, 100.0)
    found = []
    for epoch in range(2):
        made.set_epoch(epoch)
        found += list(made)
    rows = [found[i : i + WINDOW] for i in range(0, len(found), WINDOW)]
    assert rows[:5] == steps(plain)[:5]
    assert [sum(row >= NEW for row in step) for step in rows] == [2] * 5 + [4] * 25 + [7] * 10
    # places of new rows, and no others, are taken
    for raised, planned in zip(rows, steps(plain), strict=True):
        assert all(a == b for a, b in zip(raised, planned) if a < NEW or b >= NEW)
    assert made.shown(33).tolist() == found[: 33 * WINDOW]
    assert len(made) == len(plain)
    again = sampler(epochs=2)
    again.raise_share(5, 2.0)
    assert again.shown(29).tolist() == found[: 29 * WINDOW]
    again.raise_share(5, 1.0)
    assert again.shown(20).tolist() == plain.shown(20).tolist()
