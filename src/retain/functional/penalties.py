"""Quadratic pulls towards earlier weights, as numbers and as gradients that need no graph.

    value  ½ Σ_i λ F_i (θ_i − θ*_i)²          gradient  λ F ⊙ (θ − θ*)

With F the Fisher information this is EWC (Kirkpatrick 2017, arXiv:1612.00796, eq. 3), with F = 1 it is L2-SP
(Li 2018, arXiv:1802.01483). All element-wise, hence right on shards. For LoRA the anchored quantity is
the product s·BA, never the factors: see `LowRank`.

Lists hold one entry per tensor, in the same order. A strength (and a learning rate) is one number or one
number per tensor; a tensor of strength 0 is not touched at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retain.errors import ConfigError

Strength = float | Sequence[float]
Importances = Sequence[Tensor | None] | None

#: Elements handled at once: bounds the temporary copy θ − θ* to 256 MiB in float32.
GROUP_ELEMENTS = 2**26
#: The same on a CPU, where larger tensors are taken in pieces: θ − θ* then stays in the cache. A temporary copy of
#: a whole tensor costs ten times as much, because its memory is mapped anew in every step.
BLOCK_ELEMENTS = 2**19


def quadratic_value(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importance: Importances, strength: Strength
) -> Tensor:
    """½ Σ λ F (θ − θ*)², a scalar in at least float32; differentiable in `params`.

    Args:
        params: θ, tensors of any shape.
        anchors: θ*, same shapes.
        importance: F, same shapes; None (for all, or for one tensor) stands for 1.
        strength: λ ≥ 0.

    Raises:
        ConfigError: lists of different lengths, or a negative or non-finite strength.
    """
    rows = _zip("penalty", params, anchors, importance, strength)
    if rows and not any(t.requires_grad for p, a, f, _ in rows for t in (p, a, f) if t is not None):
        return _value(rows)
    total = None
    for p, a, f, s in rows:
        squares = (_wide(p) - _wide(a)).square()
        term = 0.5 * s * (squares if f is None else squares * f).sum()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total


def _value(rows: Sequence[tuple[Tensor, Tensor, Tensor | None, float]]) -> Tensor:
    """The value without a graph: in pieces, their sums added in float64 (float32 where there is none)."""
    params = [row[0] for row in rows]
    total = _zero(params)
    room = _Room()
    for row in rows:
        for p, a, f, s in _pieces(row):
            squares = room.differences([_wide(p)], [_wide(a)])[0].square_()
            total += 0.5 * s * (squares if f is None else squares.mul_(f)).sum()
    return _narrow(total, params)


class _Room:
    """Memory for what is needed for a moment, on a CPU taken once per sweep.

    Taking it anew for every block can cost more than the arithmetic, where the allocator gives it back in between.
    """

    def __init__(self) -> None:
        self._flat: dict[torch.dtype, Tensor] = {}

    def _take(self, start: int, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        if like.device.type != "cpu" or start + like.numel() > BLOCK_ELEMENTS:
            return None
        if dtype not in self._flat:
            self._flat[dtype] = torch.empty(BLOCK_ELEMENTS, dtype=dtype)
        return self._flat[dtype][start : start + like.numel()].view(like.shape)

    def differences(self, first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        """first − second, tensor by tensor; overwritten by the next call."""
        if first[0].device.type != "cpu":
            return list(torch._foreach_sub(first, second))
        found, start = [], 0
        for x, y in zip(first, second):
            found.append(torch.sub(x, y, out=self._take(start, x, torch.promote_types(x.dtype, y.dtype))))
            start += x.numel()
        return found

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """first · second; overwritten by the next call."""
        return torch.mul(first, second, out=self._take(0, first, torch.promote_types(first.dtype, second.dtype)))


def _zero(params: Sequence[Tensor]) -> Tensor:
    if not params:
        return torch.zeros(())
    device = params[0].device
    return torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def _narrow(total: Tensor, params: Sequence[Tensor]) -> Tensor:
    return total.to(torch.promote_types(torch.float32, params[0].dtype)) if params else total


@torch.no_grad()
def add_quadratic_gradient(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importance: Importances,
    strength: Strength,
    value: bool = False,
) -> Tensor | None:
    """gradients += λ F ⊙ (θ − θ*), in place; with `value` also ½ Σ λ F (θ − θ*)², from the same sweep over memory.

    Arguments and errors as in `quadratic_value`.

    Returns:
        The value as `quadratic_value` gives it, or None.
    """
    _same_length("penalty", gradients=gradients, params=params)
    rows = _zip("penalty", params, anchors, importance, strength)
    total, room, more = _zero(params), _Room(), _Room()
    for group in _groups([(g, *row) for g, row in zip(gradients, rows) if row[3] != 0]):
        g, p, a, f, s = (list(column) for column in zip(*group))
        for gradient, d, weights, number in zip(g, room.differences(p, a), f, s):
            weighted = d if weights is None else more.product(d, weights) if value else d.mul_(weights)
            if value:
                total += 0.5 * number * torch.dot(_wide(d).flatten(), _wide(weighted).flatten())
            gradient.add_(weighted, alpha=number)
    return _narrow(total, params) if value else None


@torch.no_grad()
def proximal(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importance: Importances,
    strength: Strength,
    learning_rate: Strength,
) -> None:
    """θ ← (θ + ηλFθ*) / (1 + ηλF), in place: the implicit step of the pull alone, after the optimizer's.

    It is the minimiser of ‖x − θ‖²/(2η) + ½ λ Σ F (x − θ*)², is stable for any ηλF, and is not divided by
    Adam's second moment. Computed as θ + k/(1+k) · (θ* − θ) with k = ηλF, which leaves θ = θ* bit for bit.

    Args:
        params, anchors, importance, strength: as in `quadratic_value`.
        learning_rate: η ≥ 0.

    Raises:
        ConfigError: as in `quadratic_value`.
    """
    rates = _numbers("learning_rate", learning_rate, len(params))
    rows = _zip("penalty", params, anchors, importance, strength)
    rows = [(p, a, f, s * rate) for (p, a, f, s), rate in zip(rows, rates)]
    room = _Room()
    for group in _groups([row for row in rows if row[3] != 0]):
        p, a, f, k = (list(column) for column in zip(*group))
        pull = room.differences(a, p)
        for i, (weights, number) in enumerate(zip(f, k)):
            if weights is None:
                pull[i].mul_(number / (1 + number))
            else:
                stiff = weights * number
                pull[i].mul_(stiff / (1 + stiff))
        torch._foreach_add_(p, pull)


@torch.no_grad()
def stiffness(importance: Sequence[Tensor | None], strength: Strength, learning_rate: Strength) -> float:
    """max η·λ·F. Plain gradient descent on the pull oscillates above 1 and diverges from 2 on.

    Args:
        importance: F per tensor; None stands for 1.
        strength: λ.
        learning_rate: η.
    """
    count = len(importance)
    rows = zip(importance, _numbers("strength", strength, count), _numbers("learning_rate", learning_rate, count))
    sizes = [s * rate * (1.0 if f is None else _number(f.max())) for f, s, rate in rows if s and rate]
    return max(sizes, default=0.0)


@dataclass(frozen=True)
class LowRank:
    """One LoRA update s·BA that is pulled to s·B0A0, weighted by F̂_ij = r_i c_j / Σr.

    F̂ has the row and column sums of F when r and c are its row and column sums; without them F̂ = 1.

    Args:
        b: B [m, r].
        a: A [r, n].
        b0, a0: the factors of the anchor, [m, r0] and [r0, n]; None when the anchor is 0 (after a merge).
        scale: s, α/r (rank-stabilised α/√r).
        rows, columns: r [m] and c [n], ≥ 0; both or neither.
    """

    b: Tensor
    a: Tensor
    b0: Tensor | None = None
    a0: Tensor | None = None
    scale: float = 1.0
    rows: Tensor | None = None
    columns: Tensor | None = None


def low_rank_value(factors: Sequence[LowRank], strength: Strength) -> Tensor:
    """Σ ½ λ s² Σ_ij F̂_ij ((BA − B0A0)_ij)² without forming m×n; a scalar, differentiable in B and A.

    With BA − B0A0 = L R the sum is tr((Lᵀ D_r L)(R D_c Rᵀ)) / Σr, which costs O(rank² (m + n)). Without
    weights this is ½ λ ‖s (BA − B0A0)‖²_F; the weighted sum Σ F ⊙ (BA)² is EWC-LoRA (arXiv:2602.17559).

    Raises:
        ConfigError: one of a pair (b0 and a0, rows and columns) is missing, or a bad strength.
    """
    total = None
    for factor, number in zip(factors, _numbers("strength", strength, len(factors))):
        left, right, rows, columns, weight = _split(factor)
        inner_left = left.T @ (left if rows is None else rows[:, None] * left)
        inner_right = (right if columns is None else right * columns) @ right.T
        term = 0.5 * number * weight * (inner_left * inner_right.T).sum()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total


@torch.no_grad()
def low_rank_gradients(factors: Sequence[LowRank], strength: Strength) -> list[tuple[Tensor, Tensor]]:
    """Closed gradients of `low_rank_value`: for each factor (∂/∂B [m, r], ∂/∂A [r, n]), in at least float32.

    ∂/∂B = λs²/Σr · D_r L (R D_c Aᵀ) and ∂/∂A = λs²/Σr · (Bᵀ D_r L) R D_c (with F̂ in place of F, these are
    λ(F⊙ΔW)Aᵀ and λBᵀ(F⊙ΔW) of arXiv:2602.17559).

    Raises:
        ConfigError: as in `low_rank_value`.
    """
    result = []
    for factor, number in zip(factors, _numbers("strength", strength, len(factors))):
        left, right, rows, columns, weight = _split(factor)
        left = left if rows is None else rows[:, None] * left
        right = right if columns is None else right * columns
        slope_b = left @ (right @ _wide(factor.a).T)
        slope_a = (_wide(factor.b).T @ left) @ right
        result.append((slope_b * (number * weight), slope_a * (number * weight)))
    return result


def _split(factor: LowRank) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor]:
    """L and R with BA − B0A0 = L R, r, c, and s²/Σr."""
    if (factor.b0 is None) != (factor.a0 is None) or (factor.rows is None) != (factor.columns is None):
        raise ConfigError("low-rank penalty: give both or none of b0 and a0, and both or none of rows and columns.")
    b, a = _wide(factor.b), _wide(factor.a)
    if factor.b0 is None or factor.a0 is None:
        left, right = b, a
    elif factor.b0.shape == factor.b.shape:
        # (B − B0) A + B0 (A − A0) cancels nothing near the anchor, and is exactly 0 at it.
        b0, a0 = factor.b0.to(b.dtype), factor.a0.to(a.dtype)
        left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
    else:
        left = torch.cat([b, -factor.b0.to(b.dtype)], dim=1)
        right = torch.cat([a, factor.a0.to(a.dtype)])
    square = float(factor.scale) ** 2
    if factor.rows is None or factor.columns is None:
        return left, right, None, None, square
    rows, columns = factor.rows.to(b.dtype), factor.columns.to(b.dtype)
    total = rows.sum()  # all-zero importance protects nothing
    return left, right, rows, columns, torch.where(total > 0, square / torch.where(total > 0, total, 1), 0)


def _number(scalar: Tensor) -> float:
    """Value of a scalar; that of the whole where it was reduced from a sharded tensor."""
    return (scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar).item()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _numbers(name: str, given: Strength, count: int) -> list[float]:
    numbers = [float(given)] * count if isinstance(given, (int, float)) else [float(x) for x in given]
    _same_length("penalty", **{name: numbers, "tensors": range(count)})
    for number in numbers:
        if not 0 <= number < float("inf"):
            raise ConfigError(f"penalty.{name}: {number} given; allowed: a finite number ≥ 0.")
    return numbers


def _same_length(where: str, **lists: Sequence) -> None:
    if len({len(entries) for entries in lists.values()}) > 1:
        sizes = ", ".join(f"{len(entries)} {name}" for name, entries in lists.items())
        raise ConfigError(f"{where}: {sizes} given; allowed: equally many. Give one entry per tensor.")


def _zip(
    where: str,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importance: Importances,
    strength: Strength,
) -> list[tuple[Tensor, Tensor, Tensor | None, float]]:
    weights = [None] * len(params) if importance is None else list(importance)
    _same_length(where, params=params, anchors=anchors, importance=weights)
    return list(zip(params, anchors, weights, _numbers("strength", strength, len(params))))


def _groups(rows: list[tuple]) -> Iterator[list[tuple]]:
    """Rows in order, cut so that the first tensors of a group have at most `GROUP_ELEMENTS` elements.

    On a CPU at most `BLOCK_ELEMENTS`; large tensors then come in several groups, as views.
    """
    group: list[tuple] = []
    size = 0
    for row in (piece for whole in rows for piece in _pieces(whole)):
        limit = BLOCK_ELEMENTS if row[0].device.type == "cpu" else GROUP_ELEMENTS
        if group and size + row[0].numel() > limit:
            yield group
            group, size = [], 0
        group.append(row)
        size += row[0].numel()
    if group:
        yield group


def _pieces(row: tuple) -> Iterator[tuple]:
    """A row of tensors of one shape, None and numbers; on a CPU in pieces of `BLOCK_ELEMENTS` that share its memory."""
    tensors = [entry for entry in row if isinstance(entry, Tensor)]
    first = tensors[0]
    fits = first.device.type != "cpu" or first.numel() <= BLOCK_ELEMENTS
    if fits or not all(t.is_contiguous() and t.shape == first.shape for t in tensors):
        yield row
        return
    flat = [entry.view(-1) if isinstance(entry, Tensor) else entry for entry in row]
    for start in range(0, first.numel(), BLOCK_ELEMENTS):
        part = slice(start, start + BLOCK_ELEMENTS)
        yield tuple(entry[part] if isinstance(entry, Tensor) else entry for entry in flat)
