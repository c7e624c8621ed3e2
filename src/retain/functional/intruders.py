"""Intruder dimensions: large singular directions of a fine-tuned matrix that its base does not have.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228): with
W = U S Vᵀ and W⁰ = U⁰ S⁰ V⁰ᵀ, direction i among the largest `top` of W is an intruder where

    max_j |⟨u_i, u⁰_j⟩| < threshold ,        and it is scaled down:   W − strength · s_i u_i v_iᵀ .

`strength` = 1 − λ of the paper (`mitigation_lambda` of PEFT): at λ = 1 the matrix stays as it is, at λ = 0 the
direction is gone. Deviations: any fine-tuned matrix will do, not only W⁰ + BA; the result is not cut to an adapter's
rank, as PEFT does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Intruders(NamedTuple):
    """k intruders of one matrix W [m, n]: Σ left[:, i] right[i] is what they make of it.

    Args:
        left: [m, k], singular vectors times their singular values.
        right: [k, n].
        places: [k], their ranks among the singular values of W, 0 for the largest.
    """

    left: Tensor
    right: Tensor
    places: Tensor


@torch.no_grad()
def intruders(start: Tensor, final: Tensor, top: int = 10, threshold: float = 0.5) -> Intruders:
    """Those of `final` against `start`, both [m, n]; two singular value decompositions, in float32 at least.

    Args:
        start: W⁰.
        final: W.
        top: how many of the largest directions are looked at.
        threshold: largest |cosine| to a direction of `start` below which a direction is an intruder, 0 to 1.
    """
    wide = torch.promote_types(torch.promote_types(start.dtype, final.dtype), torch.float32)
    known = torch.linalg.svd(start.to(wide), full_matrices=False).U
    u, s, vh = torch.linalg.svd(final.to(wide), full_matrices=False)
    nearest = (u[:, :top].T @ known).abs().amax(dim=1)
    places = torch.nonzero(nearest < threshold).flatten()
    return Intruders(u[:, places] * s[places], vh[places], places)
