"""Which weights a task keeps, and one task's model out of a later one."""

import pytest
import torch

from retain.functional.ownership import largest_changes, of_task


def slow(change, free, share):
    """By sorting: the positions to keep, in memory order among equals."""
    change, free = change.reshape(-1).tolist(), free.reshape(-1).tolist()
    places = sorted((i for i in range(len(change)) if free[i]), key=lambda i: -abs(change[i]))
    count = max(1, int(share * len(places)))
    return {i for i in places[:count] if change[i] != 0}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_largest_of_the_free_are_kept(share, seed):
    chance = torch.Generator().manual_seed(seed)
    change = torch.randn(7, 9, generator=chance, dtype=torch.float64).mul(3).round()  # many equal ones, and zeros
    free = torch.rand(7, 9, generator=chance) < 0.6
    kept = largest_changes(change, free, share)
    assert set(kept.reshape(-1).nonzero()[:, 0].tolist()) == slow(change, free, share)
    assert not bool((kept & ~free).any())


def test_nothing_free_and_nothing_changed_keep_nothing():
    change = torch.ones(2, 3)
    assert not largest_changes(change, torch.zeros(2, 3, dtype=torch.bool), 1.0).any()
    assert not largest_changes(change * 0, torch.ones(2, 3, dtype=torch.bool), 1.0).any()


def test_a_long_tensor_keeps_exactly_the_share():
    change = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    free = torch.ones_like(change, dtype=torch.bool)
    kept = largest_changes(change, free, 0.3)
    assert int(kept.sum()) == 36000
    assert float(change[kept].abs().min()) >= float(change[~kept].abs().max())


def test_of_task_is_the_base_with_what_the_tasks_up_to_it_own():
    owner = torch.tensor([[0, 1, 2], [3, 2, 255]], dtype=torch.uint8)
    base, last = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3) + 10
    for task in (0, 1, 2, 3, 255):
        found = of_task(last, base, owner, task)
        for i in range(2):
            for j in range(3):
                owned = 1 <= int(owner[i, j]) <= task
                assert found[i, j] == (last if owned else base)[i, j]
