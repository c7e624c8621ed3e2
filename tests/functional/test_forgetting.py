"""Signs, limits, and estimators against simulated models that know or guess."""

import math

import numpy as np
import pytest

from retain.errors import DataError
from retain.functional import forgetting


def test_flips():
    found = forgetting.flips([1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0])
    assert found == (2, 1, 1, 3)
    assert found.items == 7


def know_or_guess(known, lost, gained, k, n=200_000, seed=0):
    """Outcomes of a model that answers what it knows and guesses afresh among k options otherwise."""
    rng = np.random.default_rng(seed)
    before = np.arange(n) < known * n
    after = np.arange(n) < (known - lost) * n
    after |= np.arange(n) >= (1 - gained) * n
    guess = rng.random((2, n)) < 1 / k
    return before | guess[0], after | guess[1]


@pytest.mark.parametrize(
    ("known", "lost", "gained", "raw", "adjusted"),
    [
        (0.5, 0, 0, 0.093, 0.047),
        (0.5, 0.1, 0, 0.168, 0.112),
        (0.4, 0.05, 0.08, 0.135, 0.071),
        (0.2, 0.02, 0, 0.164, 0.041),
    ],
)
def test_paired_estimator_recovers_the_truth(known, lost, gained, raw, adjusted):
    found = forgetting.sample_forgetting(*know_or_guess(known, lost, gained, 4), choices=4)
    assert found.paired == pytest.approx(lost, abs=0.004)
    assert found.paired_gain == pytest.approx(gained, abs=0.004)
    assert (found.raw, found.adjusted) == pytest.approx((raw, adjusted), abs=0.004)


def test_strata_of_different_options():
    two, five = know_or_guess(0.6, 0.1, 0, 2, 60_000), know_or_guess(0.3, 0.02, 0.05, 5, 120_000, 1)
    before, after = (np.concatenate(pair) for pair in zip(two, five))
    choices = np.repeat([2, 5], [60_000, 120_000])
    found = forgetting.sample_forgetting(before, after, choices)
    assert found.paired == pytest.approx((0.1 + 2 * 0.02) / 3, abs=0.006)
    a, b = forgetting.sample_forgetting(*two, choices=2), forgetting.sample_forgetting(*five, choices=5)
    assert found == pytest.approx([(x + 2 * y) / 3 for x, y in zip(a, b)])


def test_formulas_by_hand():
    before, after = np.repeat([1, 1, 0, 0], [50, 20, 10, 20]), np.repeat([1, 0, 1, 0], [50, 20, 10, 20])
    found = forgetting.sample_forgetting(before, after, 4)
    assert found.raw == 0.2
    assert found.raw_gain == 0.1
    assert found.adjusted == pytest.approx(0.2 - 0.3 * 0.4 / 3)
    assert found.paired == pytest.approx(4 / 3 * (0.2 - 0.2 / 3))
    assert found.paired_gain == pytest.approx(4 / 3 * (0.1 - 0.2 / 3))


def test_swapping_before_and_after_swaps_loss_and_gain():
    before, after = know_or_guess(0.4, 0.1, 0.03, 3, 5000)
    there, back = (forgetting.sample_forgetting(*p, 3) for p in ((before, after), (after, before)))
    assert there == pytest.approx((*back[3:], *back[:3]))
    assert after.mean() - before.mean() == pytest.approx(there.raw_gain - there.raw)


def test_everything_known_then_nothing():
    """Lost items are still guessed right once in k, so the paired estimate exceeds the raw one."""
    before, after = np.ones(400), np.arange(400) % 4 == 0
    found = forgetting.sample_forgetting(before, after, 4)
    assert (found.raw, found.adjusted, found.paired) == pytest.approx((0.75, 0.75, 1.0))


def test_without_options_all_three_are_raw():
    before, after = [1, 1, 0, 0], [0, 1, 1, 0]
    assert forgetting.sample_forgetting(before, after) == (0.25,) * 6
    assert forgetting.sample_forgetting(before, after, [None] * 4) == (0.25,) * 6


def test_contributions_average_to_the_estimate():
    before, after = know_or_guess(0.4, 0.1, 0.03, 3, 300)
    choices = [None if i % 3 == 0 else 2 + i % 4 for i in range(300)]
    items = forgetting.paired_contributions(before, after, choices)
    assert items.mean() == pytest.approx(forgetting.sample_forgetting(before, after, choices).paired)


def test_relative_numbers():
    assert forgetting.relative_drop(0.8, 0.6) == pytest.approx(0.25)
    assert forgetting.relative_drop(0.6, 0.8) == 0
    assert forgetting.relative_drop(0, 0) == 0
    assert forgetting.perplexity_increase(10, 12) == pytest.approx(0.2)
    assert forgetting.perplexity_increase(10, 9) == pytest.approx(-0.1)
    assert forgetting.retention(0.8, 0.6) == pytest.approx(75)
    assert forgetting.retention(0.6, 0.8) == 100
    assert forgetting.perplexity_retention(10, 12) == pytest.approx(80)
    assert forgetting.perplexity_retention(10, 5) == 100
    assert forgetting.perplexity_retention(10, 25) == 0


def test_bands():
    assert [forgetting.band(x) for x in (100, 90, 89.9, 70, 69.9, 50, 49.9, 0)] == [
        "excellent", "excellent", "good", "good", "fair", "fair", "poor", "poor",
    ]  # fmt: skip


def test_signs():
    """Task 1 drops from 80 to 60: forgetting is +20 and backward transfer −20."""
    found = forgetting.sequence_metrics([[30, 10], [80, 15], [60, 70]])
    assert found.forgetting == 20
    assert found.backward_transfer == -20
    assert found.forward_transfer == 5
    assert found.accuracy == 65
    assert found.incremental_accuracy == (80 + 65) / 2
    assert found.plasticity == 75
    assert found.stability == 0.75
    assert found.intransigence is None


def slow_metrics(r, single):
    """The definitions with 1-based indices and nothing else."""
    t = len(r) - 1
    cell = lambda i, j: r[i][j - 1]  # noqa: E731
    tasks = range(1, t + 1)
    return (
        sum(cell(t, j) for j in tasks) / t,
        sum(sum(cell(i, j) for j in range(1, i + 1)) / i for i in tasks) / t,
        sum(cell(t, j) - cell(j, j) for j in range(1, t)) / (t - 1),
        sum(cell(j - 1, j) - cell(0, j) for j in range(2, t + 1)) / (t - 1),
        sum(max(cell(i, j) - cell(t, j) for i in range(1, t)) for j in range(1, t)) / (t - 1),
        sum(cell(j, j) for j in tasks) / t,
        sum(cell(t, j) / cell(j, j) for j in range(1, t)) / (t - 1),
        sum(single[j - 1] - cell(j, j) for j in tasks) / t,
    )


def test_random_matrices_against_the_definitions():
    rng = np.random.default_rng(0)
    for tasks in (2, 3, 6):
        for _ in range(20):
            r, single = rng.random((tasks + 1, tasks)), rng.random(tasks)
            found = forgetting.sequence_metrics(r.tolist(), single)
            assert found == pytest.approx(slow_metrics(r, single))
            assert found.forgetting >= -found.backward_transfer - 1e-12


def test_no_forgetting_is_zero():
    found = forgetting.sequence_metrics([[0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.9, 0.8, 0.3], [0.9, 0.8, 0.7]])
    assert (found.forgetting, found.backward_transfer, found.forward_transfer) == (0, 0, 0)
    assert found.stability == 1


def test_one_task_leaves_most_undefined():
    found = forgetting.sequence_metrics([[0.2], [0.7]], [0.9])
    assert found == (0.7, 0.7, None, None, None, 0.7, None, pytest.approx(0.2))
    assert forgetting.sequence_metrics([[]]) == (None,) * 8


def test_missing_cells():
    with pytest.raises(DataError, match="no score of task 1 after task 2"):
        forgetting.sequence_metrics([[0.1, 0.2], [0.8, 0.3], [None, 0.9]])
    with pytest.raises(DataError, match="no score of task 2 after task 0"):
        forgetting.sequence_metrics([[0.1, None, 0.2], [0.8, 0.3, 0.1], [0.8, 0.9, 0.1], [0.8, 0.9, 0.9]])
    unmeasured = forgetting.sequence_metrics([[None, None], [0.8, None], [0.6, 0.9]])
    assert unmeasured.forward_transfer is None
    assert unmeasured.forgetting == pytest.approx(0.2)
    with pytest.raises(DataError, match="T\\+1 rows"):
        forgetting.sequence_metrics([[0.1, 0.2], [0.8, 0.3]])


def test_stability_of_a_task_never_learned_is_undefined():
    assert forgetting.sequence_metrics([[0, 0], [0, 0], [0.1, 0.5]]).stability is None


def test_verdict_numbers():
    found = forgetting.verdict_numbers([0.1, 0.0, -0.2], [0.5, 0.1], [0.8, 0.9, 0.7])
    assert found.forgetting == pytest.approx(0.1 / 3)
    assert found.improvement == pytest.approx(0.3)
    assert found.improvement_score == pytest.approx(0.65)
    assert found.balance == pytest.approx(0.6 * (1 - 0.1 / 3) + 0.4 * 0.65)
    assert found.stability_efficiency == pytest.approx(0.8 * found.balance)
    assert found.successful
    assert not forgetting.verdict_numbers([0.1], [0.5], [0.8], max_forgetting=0.05).successful
    assert not forgetting.verdict_numbers([0.1], [0.05], [0.8]).successful
    assert not forgetting.verdict_numbers([0.1], [0.5], [0.6]).successful
    assert forgetting.verdict_numbers([0.1], [9.0], [0.8]).improvement_score == 1
    assert forgetting.verdict_numbers([50.0], [9.0], [0.8]).forgetting == 1
    assert forgetting.verdict_numbers([0.1], [], [0.8]).improvement == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: forgetting.flips([], []),
        lambda: forgetting.flips([1, 0], [1]),
        lambda: forgetting.flips([1, 0.5], [1, 0]),
        lambda: forgetting.sample_forgetting([1, 0], [1, 0], 1),
        lambda: forgetting.sample_forgetting([1, 0], [1, 0], [4]),
        lambda: forgetting.perplexity_increase(0, 3),
        lambda: forgetting.verdict_numbers([], [], []),
        lambda: forgetting.sequence_metrics([[0.1], [0.2]], [0.1, 0.2]),
        lambda: forgetting.sequence_metrics([[0.1], [math.nan]]),
    ],
)
def test_bad_input_is_one_line(call):
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
