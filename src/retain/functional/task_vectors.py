"""What models learned, put together: shares for whole changes, and rules for single entries of them.

τ = θ − θ⁰ is the change that a model went through (task vector, Ilharco 2022, arXiv:2212.04089). Everything here works
on τ piece by piece, so that no more than a piece of each model is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

#: Below this sine two directions are taken as one (or as opposite), where SLERP has no plane to turn in.
_PARALLEL = 1e-6


def gram(pieces: Iterable[Sequence[Tensor]]) -> Tensor:
    """Inner products of n long vectors that come in pieces.

    Args:
        pieces: n tensors of one shape, again and again; together they are the vectors.

    Returns:
        [n, n] in float64.
    """
    total: Tensor | None = None
    for piece in pieces:
        rows = torch.stack([part.reshape(-1).double() for part in piece])
        own = rows @ rows.T
        total = own if total is None else total.add_(own)
    if total is None:
        raise ValueError("gram: no pieces")
    return total


def cosine(products: Tensor, i: int, j: int) -> float:
    """Cosine of the angle between vectors i and j, given their inner products [n, n]; 0 where one of them is zero."""
    norms = float(products[i, i].sqrt() * products[j, j].sqrt())
    return max(-1.0, min(1.0, float(products[i, j]) / norms)) if norms > 0 else 0.0


def spherical(products: Tensor, share: float) -> tuple[float, float]:
    """Shares of two vectors for SLERP (Shoemake 1985): sin((1−t)Ω)/sinΩ and sin(tΩ)/sinΩ, Ω the angle between them.

    Vectors of unequal length are taken as they are, only the angle is that of their directions; on parallel or
    opposite ones, and where one is zero, the shares are those of a straight line.

    Args:
        products: [2, 2] inner products.
        share: t; 0 is the first, 1 the second.
    """
    if share in (0, 1) or not bool((products.diagonal() > 0).all()):
        return 1 - share, share
    angle = math.acos(cosine(products, 0, 1))
    if math.sin(angle) < _PARALLEL:
        return 1 - share, share
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def stock(products: Tensor) -> float:
    """How far the mean of n fine-tuned models is taken from the base: t = n cosθ / (1 + (n−1) cosθ).

    Jang 2024 (arXiv:2403.19522, eq. 2 and its form for n models). θ is the angle between changes; for more than two
    the mean of the cosines of all pairs. Changes that are at right angles or point away from each other have nothing
    in common: t = 0, the base.

    Args:
        products: [n, n] inner products of the changes of one tensor.
    """
    count = len(products)
    pairs = [cosine(products, i, j) for i in range(count) for j in range(i)]
    shared = max(0.0, sum(pairs) / len(pairs))
    return count * shared / (1 + (count - 1) * shared)


def kept_entries(entries: int, density: float) -> int:
    """How many entries of a tensor a density keeps; the nearest whole number, at least one while density > 0."""
    return max(min(1, entries), round(density * entries)) if density > 0 else 0


def kth_magnitude(pieces: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """The k-th largest magnitude of a vector that comes in pieces, exactly.

    A radix search over the bits of |x|, 16 at a time: magnitudes of floating-point numbers are ordered as the whole
    numbers that their bits spell. The pieces are read twice in float32, four times in float64; nothing is sorted.

    Args:
        pieces: gives the pieces anew at every call, all float32 or all float64.
        k: from 1 to the length of the vector.

    Returns:
        A scalar of the pieces' dtype.

    Raises:
        ValueError: k out of range.
    """
    found, left, shift, kind = 0, k, None, torch.float32
    while shift != 0:
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for piece in pieces():
            kind = piece.dtype
            bits = piece.abs().reshape(-1).view(torch.int32 if kind == torch.float32 else torch.int64)
            if shift is None:
                shift = bits.element_size() * 8
            if shift != bits.element_size() * 8:
                bits = bits[bits >> shift == found]
            counts += torch.bincount((bits >> (shift - 16)) & 0xFFFF, minlength=1 << 16)
        above = counts.flip(0).cumsum(0)  # entries with these 16 bits or larger ones, the largest first
        place = int(torch.searchsorted(above, left))
        if shift is None or k < 1 or place == 1 << 16:
            raise ValueError(f"kth_magnitude: k = {k} of {int(above[-1])} entries")
        left -= int(above[place - 1]) if place else 0
        shift -= 16
        found = (found << 16) | ((1 << 16) - 1 - place)
    return torch.tensor(found, dtype=torch.int32 if kind == torch.float32 else torch.int64).view(kind)


def trim(change: Tensor, least: Tensor) -> Tensor:
    """τ with entries smaller than `least` in magnitude set to zero (TIES, step 1)."""
    return change.where(change.abs() >= least, 0)


def elect(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES, steps 2 and 3 (Yadav 2023, arXiv:2306.01708): elect a sign for each entry, average those that agree.

    The sign is that of Σ w τ, on which a tie is positive; the result is Σ w τ / Σ w over the models whose entry has
    it, and zero where none has. With equal weights these are the sums and means of the paper.

    Args:
        changes: n trimmed τ of one shape.
        weights: n positive numbers, of which only the ratios count.
    """
    votes = sum((w * tau for w, tau in zip(weights, changes, strict=True)), torch.zeros_like(changes[0]))
    sign = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    total, mass = torch.zeros_like(votes), torch.zeros_like(votes)
    for weight, tau in zip(weights, changes):
        agrees = tau * sign > 0
        total += weight * tau * agrees
        mass += weight * agrees
    return total / mass.where(mass > 0, 1)


def drop(change: Tensor, density: float, random: torch.Generator) -> Tensor:
    """DARE (Yu 2023, arXiv:2311.03099): each entry stays with probability `density`, divided by it; else it is zero.

    Its expectation is τ. At density 1 it is τ, and nothing is drawn.
    """
    if density == 1:
        return change
    kept = torch.rand(change.shape, generator=random) < density
    return change * kept / density
