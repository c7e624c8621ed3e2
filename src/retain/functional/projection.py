"""What part of a step may be taken: projections on gradients and weights, and the choice of entries and columns.

Bases are matrices with orthonormal columns. Lists hold one entry per tensor, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: Directions whose length is below this share of the longest are rounding, not directions.
NOISE = 1e-6
_BLOCK = 2**20  # numbers that stay in the cache of a CPU between two looks


@torch.no_grad()
def dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """⟨a, b⟩ over all tensors together; each summed in at least float32, the sums in float64."""
    sums = [(_wide(a) * _wide(b)).sum().double() for a, b in zip(first, second, strict=True)]
    if sums and all(type(one) is Tensor for one in sums):  # a GPU is waited for once, not once per tensor
        return math.fsum(torch.stack([one.to(sums[0].device) for one in sums]).tolist())
    return math.fsum(float(one) for one in sums)


@torch.no_grad()
def without_conflict(gradients: Sequence[Tensor], references: Sequence[Tensor], strength: float = 1.0) -> float:
    """g ← g − strength · (⟨g, r⟩ / ‖r‖²) r where ⟨g, r⟩ < 0, in place (A-GEM, arXiv:1812.00420, eq. 11).

    With strength 1 the result has ⟨g, r⟩ = 0: to first order the step no longer raises the reference loss.
    A reference of length 0 changes nothing.

    Args:
        gradients: g, tensors of any shape.
        references: r, same shapes.

    Returns:
        The cosine of g and r as they were given; 0 where one of them is 0.
    """
    inner, square = dot(gradients, references), dot(references, references)
    length = math.sqrt(square * dot(gradients, gradients))
    if inner < 0 and square > 0:
        for gradient, reference in zip(gradients, references):
            gradient.add_(reference.to(gradient.dtype), alpha=-strength * inner / square)
    return inner / length if length > 0 else 0.0


@torch.no_grad()
def take_out(tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """t ← t − Σ_j ⟨t, v_j⟩ v_j in place, over all tensors together (OGD, arXiv:1910.07104, alg. 1).

    Without directions nothing changes, bit for bit; with as many as there are numbers, nothing is left.

    Args:
        tensors: t, of any shapes.
        directions: v, the same tensors with one axis more in front, along which the directions are counted; orthonormal
            over all tensors together, in at least float32.

    Returns:
        ⟨t, v_j⟩ [k] as they were, in the type of the directions.
    """
    inside = directions[0].new_zeros(len(directions[0])) if directions else torch.zeros(0)
    if not len(inside):
        return inside
    for tensor, part in zip(tensors, directions, strict=True):
        inside = inside + part.flatten(1) @ tensor.to(part.dtype).flatten()
    for tensor, part in zip(tensors, directions, strict=True):
        tensor.sub_((inside @ part.flatten(1)).view_as(tensor).to(tensor.dtype))
    return inside


def more_directions(known: Sequence[Tensor], found: Iterable[Sequence[Tensor]], most: int) -> list[Tensor]:
    """Known directions and what others add to them: Gram–Schmidt, each twice, as once leaves rounding where they
    nearly coincide.

    Args:
        known: orthonormal directions, as `take_out` takes them; they come first and stay as they are.
        found: vectors of any length, each as one tensor per entry of `known`; one in the span of those before is left
            out.
        most: how many vectors there may be.

    Returns:
        The directions in the type of the known ones.
    """
    count = len(known[0])
    room = [torch.cat([part, part.new_zeros(most, *part.shape[1:])]) for part in known]
    for vector in found:  # which may be made by backward passes while this goes on
        rest = [tensor.detach().to(part.dtype, copy=True) for tensor, part in zip(vector, room, strict=True)]
        length = math.sqrt(dot(rest, rest))
        for _ in range(2):
            take_out(rest, [part[:count] for part in room])
        left = math.sqrt(dot(rest, rest))
        if left > NOISE * length:
            for part, tensor in zip(room, rest):
                part[count] = tensor / left
            count += 1
    return [part[:count] for part in room]


def off_subspace(matrix: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """(I − L Lᵀ) M (I − R Rᵀ): what is left of M [m, n] outside the subspaces L [m, k] of its columns and
    R [n, l] of its rows; None stands for no subspace. Applying it twice is applying it once."""
    if left is not None:
        matrix = matrix - left @ (left.T @ matrix)
    if right is not None:
        matrix = matrix - (matrix @ right) @ right.T
    return matrix


@torch.no_grad()
def large_directions(weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The singular directions of the largest singular values of a weight [m, n].

    Args:
        share: of min(m, n), from 0 to 1; how many directions are taken.

    Returns:
        (U [m, k], V [n, k]) in float64.
    """
    count = round(share * min(weight.shape))
    u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :count].contiguous(), vt[:count].T.contiguous()


@torch.no_grad()
def input_directions(gram: Tensor, energy: float, known: Tensor | None = None) -> Tensor:
    """The directions that hold the energy of a layer's inputs, beyond those known (GPM, arXiv:2103.09762).

    Args:
        gram: Σ x xᵀ [n, n] over the inputs x.
        energy: share of Σ ‖x‖², from 0 to 1, that the directions hold together with the known ones.
        known: orthonormal directions [n, k] of earlier inputs.

    Returns:
        [n, k + new] in float64, orthonormal, the known ones first; none is added where those hold enough.
    """
    gram = gram.double()
    total = float(gram.trace())
    basis = gram.new_zeros(len(gram), 0) if known is None else known.to(gram)
    rest = off_subspace(gram, basis, basis)
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    missing = energy * total - (total - float(rest.trace()))
    room = len(gram) - basis.shape[1]
    usable = int((values > NOISE**2 * total).sum())
    before = torch.cat([values.new_zeros(1), values.cumsum(0)[:-1]])
    count = min(int((before < missing).sum()), room, usable)
    return joined(basis, vectors[:, :count])


def joined(first: Tensor, second: Tensor) -> Tensor:
    """One orthonormal basis [n, ≤ k + l] of the span of two [n, k] and [n, l]; the first stays as it is."""
    rest = second - first @ (first.T @ second)
    rest = rest - first @ (first.T @ rest)  # once is not enough where they nearly coincide
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat([first, u[:, s > NOISE]], dim=1)


@torch.no_grad()
def top_share(sizes: Tensor, share: float) -> Tensor:
    """Mask of the largest entries of a tensor ≥ 0: ⌊share · numel⌋ of them, at least one.

    Exactly that many: among equal sizes the first in memory order are taken.
    """
    threshold, surplus = _threshold(sizes, share)
    flat = sizes.reshape(-1)
    mask = flat >= threshold
    if surplus:
        mask[(flat == threshold).nonzero()[-surplus:, 0]] = False
    return mask.view(sizes.shape)


@torch.no_grad()
def keep_top_share(values: Tensor, before: Tensor, sizes: Tensor, share: float) -> None:
    """values ← before, in place, but where |sizes| is among the largest share, as `top_share` has them. One shape."""
    if not (values.is_contiguous() and before.is_contiguous() and sizes.is_contiguous()):
        values.copy_(torch.where(top_share(sizes.abs(), share), values, before))
        return
    threshold, surplus = _threshold(sizes, share)
    for value, old, size in zip(*(_parts(tensor.view(-1)) for tensor in (values, before, sizes))):
        torch.where(size.abs() >= threshold, value, old, out=value)
    if surplus:
        last = (sizes.view(-1).abs() == threshold).nonzero()[-surplus:, 0]
        values.view(-1)[last] = before.view(-1)[last]


def column_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Σ_i |W_ij| · ‖X_j‖ [n] of the columns of W [m, n] (Wanda's score, summed as in SSU, arXiv:2512.04844).

    Args:
        squares: Σ x_j² [n] over the inputs x.
    """
    return weight.double().abs().sum(0) * squares.double().sqrt()


def _threshold(sizes: Tensor, share: float) -> tuple[Tensor, int]:
    """The smallest |size| among the largest share, and how many too many are at least as large, as some are equal.

    In a long tensor it is sought between two values of a sample, and the whole is looked at once.
    """
    flat = sizes.reshape(-1)
    total = flat.numel()
    count = max(1, int(share * total))
    if total <= 2**16:
        flat = flat.abs()
        found = flat.kthvalue(total - count + 1).values
        return found, int((flat >= found).sum()) - count
    width = sizes.shape[-1]  # columns differ in size: the sample must meet all of them
    stride = next(s for s in range(total // (2**12 if total < 2**21 else 2**16), 0, -1) if math.gcd(s, width) == 1)
    sample = flat[::stride].abs().sort(descending=True).values
    place, margin = count / total * len(sample), 2 * math.sqrt(len(sample))
    high, low = sample[max(0, int(place - margin))], sample[min(len(sample) - 1, int(place + margin))]
    larger, inside = 0, []
    for part in map(torch.abs, _parts(flat)):
        larger += int(torch.count_nonzero(part > high))
        inside.append(part[(part <= high) & (part >= low)])
    middle = torch.cat(inside)
    if count <= larger:  # the sample misled: it is among the larger ones
        larger, middle = 0, torch.cat([part[part > high] for part in map(torch.abs, _parts(flat))])
    elif count > larger + len(middle):
        larger, middle = larger + len(middle), torch.cat([part[part < low] for part in map(torch.abs, _parts(flat))])
    found = middle.kthvalue(len(middle) - (count - larger) + 1).values
    return found, larger + int(torch.count_nonzero(middle >= found)) - count


def _parts(flat: Tensor) -> tuple[Tensor, ...]:
    """A CPU looks at parts that stay in its cache, a GPU at all at once."""
    return flat.split(_BLOCK) if flat.device.type == "cpu" else (flat,)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
