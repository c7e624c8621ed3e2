"""Path integral of a loss along training: which weight earned how much of the drop (Synaptic Intelligence).

    ω_i = Σ_steps −g_i Δθ_i          Ω_i = max(0, ω_i) / (Δ_i² + ξ)

(Zenke, Poole, Ganguli 2017, arXiv:1703.04200, eq. 3 to 5). g is the gradient before a step, Δθ the move of that step
and Δ the move of the whole task. To first order Σ ω is the drop of the loss; Ω is the curvature of the parabola that
gives the same drop over the same move.

A LoRA product ΔW = s·BA is handled by rows and columns, as A and B alone have no fixed meaning. With G = ∂L/∂W the
part of a step that B makes earns Σ_j −G_ij (s dB A)_ij = Σ_k −(∂L/∂B)_ik dB_ik in row i, and the part that A makes
earns Σ_k −(∂L/∂A)_kj dA_kj in column j: exact, without G, and the same for BM, M⁻¹A in place of B, A.
"""

from __future__ import annotations

import torch
from torch import Tensor


def drop(gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """−g Δθ of one step, in at least float32; all three of one shape."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return -gradient.to(wide) * (after.to(wide) - before.to(wide))


def importance(drops: Tensor, squares: Tensor, damping: float) -> Tensor:
    """Ω = max(0, ω) / (Δ² + ξ); zero where nothing was earned, whatever Δ and ξ.

    Args:
        drops: ω, any shape.
        squares: Δ², same shape.
        damping: ξ ≥ 0.
    """
    earned = drops.clamp_min(0)
    return torch.where(earned > 0, earned / (squares + damping), 0)


def product_squares(b: Tensor, a: Tensor, b0: Tensor, a0: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Row sums [m] and column sums [n] of (s(BA − B0A0))², without forming m×n.

    Args:
        b, b0: B and its start [m, r].
        a, a0: A and its start [r, n].
        scale: s.
    """
    left, right = torch.cat([b - b0, b0], 1).double(), torch.cat([a, a - a0]).double()
    rows = ((left @ (right @ right.T)) * left).sum(1)
    columns = (((left.T @ left) @ right) * right).sum(0)
    return scale**2 * rows.clamp_min(0), scale**2 * columns.clamp_min(0)


def product_importance(
    rows: Tensor, columns: Tensor, row_squares: Tensor, column_squares: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Row and column sums r [m], c [n] of Ω for a LoRA product, Σr = Σc; the matrix is taken as r cᵀ / Σr.

    What the moves of B earned is known by row and taken as even over the columns, what those of A earned the other
    way round; so either alone gives an importance too (A may be frozen). The total is the mean of both sums.

    Args:
        rows: earned by the moves of B, per row [m].
        columns: earned by the moves of A, per column [n].
        row_squares, column_squares: sums of Δ², as from `product_squares`.
        damping: ξ ≥ 0, per weight.
    """
    m, n = len(rows), len(columns)
    r = importance(rows + columns.sum() / m, row_squares / n, damping)
    c = importance(columns + rows.sum() / n, column_squares / m, damping)
    if not (r.any() and c.any()):
        return torch.zeros_like(r), torch.zeros_like(c)
    total = (r.sum() + c.sum()) / 2
    return r * (total / r.sum()), c * (total / c.sum())
