"""How much the rows of one matrix lie along the rows of others, and the gradient of that.

    squared   Σ ‖P Aᵀ‖_F²        gradient  2 A Pᵀ P
    absolute  Σ |P Aᵀ|           gradient  sign(A Pᵀ) P

Both are 0 exactly when every row of A is orthogonal to every row of P. Squared is the penalty of O-LoRA as published
(Wang et al. 2023, arXiv:2310.14152), absolute that of its released code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["squared", "absolute"]


def overlap(a: Tensor, others: Tensor, form: Form) -> Tensor:
    """The penalty, a scalar in at least float32; differentiable in `a`.

    Args:
        a: A [r, n].
        others: P [k, n], rows of all other matrices under one another.
        form: squared or absolute.
    """
    products = _wide(a) @ _wide(others).T
    return products.square().sum() if form == "squared" else products.abs().sum()


@torch.no_grad()
def overlap_gradient(a: Tensor, others: Tensor, form: Form) -> Tensor:
    """∂ overlap / ∂A [r, n] in closed form, in at least float32. Arguments as in `overlap`."""
    others = _wide(others)
    products = _wide(a) @ others.T
    return (2 * products if form == "squared" else products.sign()) @ others


def chance_scale(rows: int, norm: float, other_rows: int, other_norm: float, width: int, form: Form) -> float:
    """The factor on P under which the overlap with an unrelated random A is about 1, whatever the sizes.

    For rows in random directions the entries of P Aᵀ have variance (‖A‖² / r)(‖P‖² / k) / n, so that the sum of their
    squares is ‖A‖²‖P‖² / n, and that of their sizes √(2/π) · √(r k) ‖A‖ ‖P‖ / √n.

    Args:
        rows, norm: r and the Frobenius norm ‖A‖.
        other_rows, other_norm: k and ‖P‖.
        width: n.
        form: squared or absolute.

    Returns:
        c, to be multiplied on P; 0 where one of the two is 0.
    """
    if norm == 0 or other_norm == 0:
        return 0.0
    squared = width / (norm * other_norm) ** 2
    return squared**0.5 if form == "squared" else (squared / (rows * other_rows) * torch.pi / 2) ** 0.5


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
