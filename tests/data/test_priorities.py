"""Late choice of rows: a function of the step and of what was known a block before, whoever asks and when."""

import numpy as np
import pytest
from scipy.stats import chisquare

from retain.data.mixture import MixtureSampler
from retain.data.priorities import Priorities
from retain.data.references import References
from retain.errors import ConfigError, RunError
from retain.functional.priorities import probabilities


def made(count=12, refresh=3, exponent=1.0, values=None):
    found = Priorities(count, (5, 1), refresh, exponent, 0.1)
    found.begin(np.arange(count, dtype=float) if values is None else values)
    return found


def run(priorities, steps, places=4, ahead=1, start=0):
    """Rows of each step, read `ahead` steps before the step is over; loss of a row = times replayed so far."""
    rows, times = {}, np.zeros(priorities.count)
    for step in range(start, steps):
        for read in range(step, min(steps, step + ahead + 1)):
            if read not in rows:
                rows[read] = priorities.rows(read, places)
        np.add.at(times, rows[step], 1)
        if priorities.step_done(step):
            chosen = priorities.to_measure(5)
            priorities.renew(step, chosen, 10.0 / (1 + chosen) + step)
    return rows


def same(one, other):
    return all(np.array_equal(one[step], other[step]) for step in one.keys() & other.keys())


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_reading_ahead_changes_nothing(ahead):
    """Prefetching and worker processes only change how early a step's rows are asked for."""
    assert same(run(made(), 20, ahead=0), run(made(), 20, ahead=ahead))


def test_reading_too_far_ahead_is_said():
    with pytest.raises(ConfigError, match="reads ahead further"):
        run(made(), 20, ahead=4)


def test_what_is_measured_decides_from_the_next_measurement_on():
    """Steps 0–5 know only the first values, 6–8 what was measured after step 2, and so on."""
    priorities = made()
    first = np.arange(12.0)
    expected = {0: first, 1: first}
    for step in range(12):
        block = step // 3
        assert priorities.chances(step) == pytest.approx(probabilities(expected[block], 1.0, 0.1))
        priorities.rows(step, 2)
        due = priorities.step_done(step)
        assert due == (step % 3 == 2)
        if due:
            values = np.full(12, float(step)) * np.linspace(1, 2, 12)
            priorities.renew(step, np.arange(12), values)
            expected[block + 2] = values


def test_a_continued_run_draws_the_same():
    whole = run(made(), 20)
    for stop in (4, 6, 8, 9):  # inside a block, and at its end
        first = made()
        run(first, stop)
        # what was read ahead is lost with the process
        second = Priorities(12, (5, 1), 3, 1.0, 0.1)
        second.load_state_dict(first.state_dict())
        for skipped in range(stop):  # the loader goes through what is over, and drops it
            second.rows(skipped, 4)
        rest = run(second, 20, start=stop)
        assert same(whole, rest)
        # an epoch that begins at the stop skips nothing
        third = Priorities(12, (5, 1), 3, 1.0, 0.1)
        third.load_state_dict(first.state_dict())
        assert same(whole, run(third, 20, start=stop))


def test_chosen_rows_are_what_the_priorities_say():
    priorities = made(count=8, refresh=0, exponent=0.7)
    drawn = [int(priorities.rows(step, 3)[0]) for step in range(4000)]
    expected = probabilities(np.arange(8.0), 0.7, 0.1)
    assert chisquare(np.bincount(drawn, minlength=8), expected * 4000).pvalue > 1e-3
    uniform = made(count=8, refresh=0, exponent=0.0)
    drawn = [int(uniform.rows(step, 3)[1]) for step in range(4000)]
    assert chisquare(np.bincount(drawn, minlength=8)).pvalue > 1e-3


def test_half_of_what_is_measured_was_just_replayed_and_no_row_waits_forever():
    priorities = made(count=30, refresh=2)
    waited, replayed = np.zeros(30, int), np.empty(0, int)
    for step in range(60):
        rows = priorities.rows(step, 3)
        replayed = rows if step % 2 == 0 else np.union1d(replayed, rows)
        if priorities.step_done(step):
            chosen = priorities.to_measure(8)
            assert len(set(chosen)) == 8
            assert np.isin(chosen, replayed).sum() >= min(4, len(replayed))
            waited += 1
            waited[chosen] = 0
            assert waited.max() <= 10, "30 rows, at least 4 of the oldest each time"
            priorities.renew(step, chosen, np.zeros(8))
    assert made(count=3).to_measure(8).tolist() == [0, 1, 2]


def test_seeds_and_tasks_differ():
    one, other = made(), Priorities(12, (5, 2), 3, 1.0, 0.1)
    other.begin(np.arange(12.0))
    assert any(not np.array_equal(one.rows(step, 4), other.rows(step, 4)) for step in range(3))


def test_state_of_other_rows_is_refused():
    with pytest.raises(RunError, match="priorities of 12 rows, but there are 9"):
        made(count=9).load_state_dict(made().state_dict())
    with pytest.raises(RunError, match="priorities of 0 rows"):
        made(count=9).load_state_dict({})


def test_rows_chosen_elsewhere_are_said():
    with pytest.raises(ConfigError, match="dispatch_batches"):
        made().step_done(0)


def sampler(choose=None, epochs=2):
    return MixtureSampler(np.ones(40), np.ones(9), lambda t: 0.25, "rows", 8, epochs, 0, choose=choose)


def test_the_plan_says_how_many_and_the_choice_says_which():
    asked = []

    def choose(step, places):
        asked.append((step, places))
        return np.full(places, step)

    plain, late = sampler(), sampler(choose)
    assert len(late) == len(plain)
    assert late.plan(0).tolist() == plain.plan(0).tolist()
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        late.set_epoch(epoch)
        before, after = np.array(list(plain)), np.array(list(late))
        assert np.array_equal(before >= 40, after >= 40)
        assert np.array_equal(before[before < 40], after[after < 40])
        windows = -(-len(before) // 8)
        steps = np.arange(len(before)) // 8 + epoch * windows
        assert np.array_equal(after[after >= 40] - 40, steps[after >= 40])
    assert [step for step, _ in asked] == list(range(2 * windows))
    assert list(plain) == before.tolist(), "choosing late did not touch the plan"


def test_rows_are_chosen_when_they_are_read():
    asked = []
    late = iter(sampler(lambda step, places: asked.append(step) or np.zeros(places, int)))
    for _ in range(8):
        next(late)
    assert asked == [0]
    next(late)
    assert asked == [0, 1]


def test_references_are_kept_whole(tmp_path):
    references = References(tmp_path / "buffer")
    assert references.load() == {}
    references.save({"b": 1.5, "a": 0.25})
    references.save({"c": 3.0})
    assert References(tmp_path / "buffer").load() == {"c": 3.0}
    assert not list((tmp_path / "buffer").glob("*.part"))
    references.path.write_bytes(b"half")
    with pytest.raises(RunError, match="damaged"):
        references.load()
