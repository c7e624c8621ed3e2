"""Which weights a task keeps for itself, and the model of one task out of that of a later one (PackNet).

Mallya & Lazebnik 2018, arXiv:1711.05769, with the change of a weight in place of the weight. The owner of a weight is
the number of the task that keeps it, from 1 on; 0 stands for a free one, which is what it was before the first task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retain.functional.projection import top_share

#: Owners are kept in one byte.
MOST_TASKS = 255


@torch.no_grad()
def largest_changes(change: Tensor, free: Tensor, share: float) -> Tensor:
    """Mask of the entries to keep: those of the largest |Δ| among the free ones.

    Args:
        change: Δ, of any shape.
        free: mask of the same shape; what is not free is never kept.
        share: of the free entries, from 0 to 1: ⌊share · free⌋ are kept, at least one. What did not change at all
            is left to later tasks even then.
    """
    kept = torch.zeros_like(free)
    sizes = change[free].abs()
    if sizes.numel():
        kept[free] = top_share(sizes, share) & (sizes > 0)
    return kept


@torch.no_grad()
def of_task(last: Tensor, base: Tensor, owner: Tensor, task: int) -> Tensor:
    """A weight as it was right after a task: what that task and those before it own, and the base everywhere else.

    Args:
        last: the weight after that task or any later one.
        base: the weight before the first task.
        owner: the owner of each entry, uint8.
        task: number of the task; 0 gives the base.
    """
    return torch.where((owner > 0) & (owner <= task), last, base)
