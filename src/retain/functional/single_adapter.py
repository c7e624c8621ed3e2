"""One adapter for a sequence of tasks: where the next task begins, and what remains after it.

SLAO (Qiao & Mahdavi 2026, arXiv:2512.23017): A begins at an orthonormal basis of the rows it had, B goes on from where
it was; afterwards B is averaged with what was merged before and A is taken as it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weight = Literal["sqrt", "mean", "last"]


@torch.no_grad()
def orthonormal_rows(a: Tensor) -> Tensor:
    """Qᵀ of the QR decomposition of Aᵀ with a positive diagonal of R, which makes it unique; [r, n] as A, r ≤ n."""
    q, r = torch.linalg.qr(a.cpu().double().T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs).T.to(device=a.device, dtype=a.dtype)


def merging_weight(task: int, weight: Weight) -> float:
    """λ of task i = 1, 2, …: 1/√i as published, 1/i (the mean of all tasks), or 1 (the last one alone)."""
    return {"sqrt": task**-0.5, "mean": 1 / task, "last": 1.0}[weight]


@torch.no_grad()
def merge(before: Tensor, tuned: Tensor, share: float) -> Tensor:
    """B_before + λ (B_tuned − B_before), in at least float32 and given back in the dtype of `tuned`."""
    wide = torch.promote_types(tuned.dtype, torch.float32)
    return torch.lerp(before.to(tuned.device, wide), tuned.to(wide), share).to(tuned.dtype)
