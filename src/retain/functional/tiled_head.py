"""Per-token numbers of a language-model head without ever holding all logits.

The head turns hidden states h [N, H] into logits z [N, V]; with N = B·T and V > 100 000 these are the largest
tensors of a training step. Everything here walks over the tokens in tiles, forward and backward: only
[tile, V] is alive at any time, and the backward pass recomputes the logits of its tile.

    a = h Wᵀ + b,   z = softcap · tanh(scale · a / softcap)   (or scale · a),   log p = log_softmax(z / T)

Matrix products of 16-bit inputs are accumulated in float32, and every result is float32 (float64 for float64
inputs). Give supervised positions only: there is no ignore index. Weight tokens by multiplying the returned
vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retain.errors import ConfigError, ModelError, unknown

Direction = Literal["forward", "reverse", "jsd"]
DIRECTIONS = ("forward", "reverse", "jsd")

#: Elements of one [tile, V] tensor when no tile size is given: 128 MiB in float32.
TILE_ELEMENTS = 2**25


@dataclass(frozen=True)
class Head:
    """An output head.

    Args:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits (`logit_scale` of Cohere, 1 / `logits_scaling` of Granite).
        softcap: bound of the logits (`final_logit_softcapping` of Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def log_probs(
    hidden: Tensor, head: Head, labels: Tensor, *, temperature: float = 1.0, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of labels and entropy of the distribution, per token, in nats.

    Differentiable in `hidden`, `head.weight` and `head.bias`, through both results:
    ∂ log p_y / ∂u = onehot(y) − p and ∂H / ∂u = −p ⊙ (log p + H) with u = z / T.

    Args:
        hidden: [N, H] hidden states of the supervised positions.
        head: the output head.
        labels: [N] token ids, or [N, K] for K ids per position (stored top-k of a teacher).
        temperature: T > 0.
        tile: tokens per tile; the result does not depend on it. Default: `TILE_ELEMENTS` / V.

    Returns:
        log-probabilities in the shape of `labels`, and entropy [N].

    Raises:
        ConfigError: temperature or tile is not positive.
        ModelError: shapes that do not fit together.
    """
    hidden, weight, bias = _prepare(hidden, head, "log_probs")
    _check_positive("log_probs", temperature=temperature, tile=tile)
    if labels.dim() not in (1, 2) or len(labels) != len(hidden):
        raise ModelError(
            f"log_probs: labels have shape {tuple(labels.shape)} for {len(hidden)} hidden states; "
            "allowed: [N] or [N, K]. Select the supervised positions of both."
        )
    ids = labels if labels.dim() == 2 else labels[:, None]
    chosen, entropy = _LogProbs.apply(
        hidden, weight, bias, ids, head.scale, head.softcap, temperature, tile or tile_size(weight)
    )
    return chosen.view(labels.shape), entropy


def divergence(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    direction: Direction = "forward",
    weight: float = 0.5,
    temperature: float = 1.0,
    exclude: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """Divergence of the student p from the teacher p⁰, per token, in nats, times T².

    Forward is KL(p⁰‖p), reverse is KL(p‖p⁰), and with m = w p⁰ + (1 − w) p
    jsd is w KL(p⁰‖m) + (1 − w) KL(p‖m) (generalised JSD, arXiv:2306.13649). All at temperature T; the
    factor T² keeps the size of the gradient (Hinton 2015, arXiv:1503.02531, §2). No gradient reaches the
    teacher.

    Args:
        hidden: [N, H] of the student; differentiable, and so are the weight and bias of `head`.
        head: the head of the student.
        teacher_hidden: [N, H_t]; H_t may differ from H.
        teacher_head: the head of the teacher, with the same V.
        direction: "forward", "reverse" or "jsd".
        weight: w, the share of the teacher in the mixture, in (0, 1); only for "jsd".
        temperature: T > 0.
        exclude: [N] token ids taken out of both distributions before they are normalised
            (Mask-the-Target, arXiv:2605.29498), or None.
        tile: tokens per tile; the result does not depend on it.

    Returns:
        [N], ≥ 0 up to rounding.

    Raises:
        ConfigError: unknown direction, or a number out of range.
        ModelError: shapes that do not fit together, or different vocabularies.
    """
    if direction not in DIRECTIONS:
        raise ConfigError(unknown("divergence.direction", str(direction), DIRECTIONS))
    _check_positive("divergence", temperature=temperature, tile=tile)
    if direction == "jsd" and not 0 < weight < 1:
        raise ConfigError(
            f"divergence.weight: {weight} given; allowed: between 0 and 1. "
            "For the ends take direction 'forward' or 'reverse'."
        )
    hidden, student_weight, bias = _prepare(hidden, head, "divergence")
    with torch.no_grad():
        teacher = _prepare(teacher_hidden.detach(), teacher_head, "divergence (teacher)")
    if teacher[1].shape[0] != student_weight.shape[0] or len(teacher[0]) != len(hidden):
        raise ModelError(
            f"divergence: the student has {len(hidden)} positions and {student_weight.shape[0]} tokens, the "
            f"teacher {len(teacher[0])} and {teacher[1].shape[0]}; both must be equal. "
            "Take a teacher with the same tokenizer."
        )
    options = (temperature, direction, weight, tile or tile_size(student_weight))
    forms = (head.scale, head.softcap, teacher_head.scale, teacher_head.softcap)
    return _Divergence.apply(hidden, student_weight, bias, *teacher, exclude, forms, options)


def sample(hidden: Tensor, head: Head, generator: torch.Generator | None = None, *, tile: int | None = None) -> Tensor:
    """Draw one label per position from the model, by inversion; [N] token ids, no gradient.

    One uniform number per position is drawn, in order, on the device of the generator (any device), so that
    the labels do not depend on the tile size.
    """
    with torch.no_grad():
        hidden, weight, bias = _prepare(hidden, head, "sample")
        uniform = _uniform(hidden, generator)
        labels = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        for rows in _tiles(len(hidden), tile or tile_size(weight)):
            logits = _logits(hidden[rows], weight, bias, head.scale, head.softcap)
            labels[rows] = invert(logits, uniform[rows])
        return labels


def sampled_log_likelihood(
    hidden: Tensor, head: Head, generator: torch.Generator | None = None, *, tile: int | None = None
) -> Tensor:
    """Σ log p of one label per position drawn from the model, a scalar; the labels are those of `sample`.

    `log_probs(hidden, head, sample(…))[0].sum()` from one product with the head instead of three: the gradient of
    a sum needs nothing from what comes after it, so it is made while the logits are there.

    Args:
        hidden: [N, H]; differentiable, and so are the weight and bias of `head`.
        head: the output head.
        generator: as in `sample`.
        tile: tokens per tile; the result does not depend on it.

    Raises:
        ConfigError: tile is not positive.
        ModelError: shapes that do not fit together.
    """
    _check_positive("sampled_log_likelihood", tile=tile)
    hidden, weight, bias = _prepare(hidden, head, "sampled_log_likelihood")
    uniform = _uniform(hidden, generator)
    return _Sampled.apply(hidden, weight, bias, uniform, head.scale, head.softcap, tile or tile_size(weight))


def _uniform(hidden: Tensor, generator: torch.Generator | None) -> Tensor:
    device = hidden.device if generator is None else generator.device
    return torch.rand(len(hidden), generator=generator, dtype=torch.float64, device=device).to(hidden.device)


def invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """Label at which the cumulative distribution of softmax(logits [N, V]) passes uniform [N] in [0, 1)."""
    steps = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(steps, uniform.double()[:, None] * steps[:, -1:], right=True)
    return found.clamp_(max=logits.shape[-1] - 1)[:, 0]


def tile_size(weight: Tensor) -> int:
    """Tokens per tile so that one [tile, V] tensor has about `TILE_ELEMENTS` elements."""
    return max(1, TILE_ELEMENTS // max(1, weight.shape[0]))


def _check_positive(where: str, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ConfigError(f"{where}.{name}: {number} given; allowed: greater than 0.")


def _prepare(hidden: Tensor, head: Head, where: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring hidden states and head to one dtype: that of autocast where it is on, as a linear layer would.

    Not on a CPU, where `_product` computes in float32 anyway: rounding the head first would cost bits, and a copy of
    [V, H] for every product.
    """
    weight, bias = head.weight, head.bias
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ModelError(
            f"{where}: hidden states {tuple(hidden.shape)} do not fit a head {tuple(weight.shape)}; "
            "allowed: [N, H] and [V, H]. Select the supervised positions first."
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64 and kind != "cpu":
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _tiles(count: int, tile: int) -> Iterator[slice]:
    for start in range(0, count, tile):
        yield slice(start, min(start + tile, count))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product of two tensors of one dtype, accumulated and returned in at least float32."""
    wide = _wide(left.dtype)
    if left.dtype == wide:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = _product(hidden, weight.T)
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class _Gradients:
    """Collects ∂/∂hidden, ∂/∂weight and ∂/∂bias tile by tile, the sums in at least float32."""

    def __init__(self, ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.inputs = (hidden, weight, bias)
        wide = _wide(hidden.dtype)
        needed = ctx.needs_input_grad
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, rows: slice, slope: Tensor, capped: Tensor | None, scale: float, softcap: float | None):
        """`slope` is ∂/∂z of the tile (overwritten); `capped` holds z where there is a soft cap."""
        if softcap is not None and capped is not None:
            slope *= 1 - (capped / softcap).square()
        if scale != 1:
            slope *= scale
        hidden, weight, _ = self.inputs
        narrow = slope.to(hidden.dtype) if hidden.is_cuda else slope
        if self.hidden is not None:
            self.hidden[rows] = _mixed(narrow, weight).to(hidden.dtype)
        if self.weight is not None:
            self.weight += _mixed(narrow.T, hidden[rows])
        if self.bias is not None:
            self.bias += slope.sum(0)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        _, weight, bias = self.inputs
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def _mixed(left: Tensor, right: Tensor) -> Tensor:
    return _product(left, right) if left.dtype == right.dtype else left @ right.to(left.dtype)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, scale, softcap, temperature, tile):
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.options = (scale, softcap, temperature, tile)
        ctx.set_materialize_grads(False)
        chosen = hidden.new_empty(ids.shape, dtype=_wide(hidden.dtype))
        entropy = chosen.new_empty(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), tile):
                logits = _logits(hidden[rows], weight, bias, scale, softcap).div_(temperature)
                log_p = torch.log_softmax(logits, dim=-1)
                chosen[rows] = log_p.gather(1, ids[rows])
                entropy[rows] = torch.special.entr(log_p.exp_()).sum(-1)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, chosen_slope, entropy_slope):
        hidden, weight, bias, ids = ctx.saved_tensors
        scale, softcap, temperature, tile = ctx.options
        gradients = _Gradients(ctx, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), tile):
                logits = _logits(hidden[rows], weight, bias, scale, softcap)
                log_p = torch.log_softmax(logits / temperature, dim=-1)
                p = log_p.exp()
                slope = torch.zeros_like(p)
                if entropy_slope is not None:
                    entropy = torch.special.entr(p).sum(-1, keepdim=True)
                    slope -= p * (log_p + entropy) * entropy_slope[rows, None]
                if chosen_slope is not None:
                    slope -= p * chosen_slope[rows].sum(-1, keepdim=True)
                    slope.scatter_add_(1, ids[rows], chosen_slope[rows])
                gradients.add(rows, slope.div_(temperature), logits, scale, softcap)
        return (*gradients.result(), None, None, None, None, None)


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, uniform, scale, softcap, tile):
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        gradients = _Gradients(ctx, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), tile):
                logits = _logits(hidden[rows], weight, bias, scale, softcap)
                labels = invert(logits, uniform[rows])[:, None]
                log_p = torch.log_softmax(logits, dim=-1)
                total += log_p.gather(1, labels).sum()
                slope = log_p.exp_().neg_()
                slope.scatter_add_(1, labels, torch.ones_like(slope[:, :1]))
                gradients.add(rows, slope, logits, scale, softcap)
        found = gradients.result()
        ctx.kept = [gradient is not None for gradient in found]
        ctx.save_for_backward(*(gradient for gradient in found if gradient is not None))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        saved = iter(ctx.saved_tensors)
        slopes = (next(saved) if kept else None for kept in ctx.kept)
        return (*(None if one is None else (upstream * one).to(one.dtype) for one in slopes), None, None, None, None)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, t_hidden, t_weight, t_bias, exclude, forms, options):
        tensors = (hidden, weight, bias, t_hidden, t_weight, t_bias, exclude)
        temperature, direction, share, tile = options
        result = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        # a frozen head: each token's gradient is upstream times a vector that is known now, while its logits are there
        ctx.at_once = ctx.needs_input_grad[:3] == (True, False, False)
        gradients = _Gradients(ctx, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), tile):
                logits, log_p, log_p0 = _both(tensors, rows, forms, temperature)
                value, slope = _compare(log_p, log_p0, direction, share, with_slope=ctx.at_once)
                result[rows] = value * temperature**2
                if ctx.at_once:
                    gradients.add(rows, _reached(slope, temperature, exclude, rows), logits, *forms[:2])
        ctx.save_for_backward(*((gradients.hidden,) if ctx.at_once else tensors))
        ctx.forms, ctx.options = forms, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.at_once:
            (slopes,) = ctx.saved_tensors
            return ((slopes * upstream[:, None]).to(slopes.dtype), *[None] * 8)
        hidden, weight, bias, *_, exclude = ctx.saved_tensors
        temperature, direction, share, tile = ctx.options
        gradients = _Gradients(ctx, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(len(hidden), tile):
                logits, log_p, log_p0 = _both(ctx.saved_tensors, rows, ctx.forms, temperature)
                _, slope = _compare(log_p, log_p0, direction, share, with_slope=True)
                slope = _reached(slope, temperature, exclude, rows) * upstream[rows, None]
                gradients.add(rows, slope, logits, *ctx.forms[:2])
        return (*gradients.result(), None, None, None, None, None, None)


def _reached(slope: Tensor, temperature: float, exclude: Tensor | None, rows: slice) -> Tensor:
    """From ∂/∂(z / T) to ∂/∂z of T² times the divergence; excluded tokens get nothing. Overwrites `slope`."""
    slope *= temperature
    return slope if exclude is None else slope.scatter_(1, exclude[rows, None], 0)


def _both(saved, rows: slice, forms, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits before exclusion, and log-probabilities of student and teacher, of one tile."""
    hidden, weight, bias, t_hidden, t_weight, t_bias, exclude = saved
    logits = _logits(hidden[rows], weight, bias, *forms[:2])
    teacher = _logits(t_hidden[rows], t_weight, t_bias, *forms[2:]).to(logits.dtype)
    scaled, teacher = logits / temperature, teacher / temperature
    if exclude is not None:
        scaled.scatter_(1, exclude[rows, None], -torch.inf)
        teacher.scatter_(1, exclude[rows, None], -torch.inf)
    return logits, torch.log_softmax(scaled, dim=-1), torch.log_softmax(teacher, dim=-1)


def _compare(log_p: Tensor, log_p0: Tensor, direction: str, share: float, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Divergence [n] and, on request, its derivative by the student's scaled logits [n, V]."""
    p = log_p.exp()
    if direction == "forward":
        p0 = log_p0.exp()
        return _expected(p0, log_p0 - log_p), p.sub_(p0) if with_slope else p
    if direction == "reverse":
        gap, factor = log_p - log_p0, 1.0
        value = expected = _expected(p, gap)
    else:
        p0, factor = log_p0.exp(), 1 - share
        log_m = (share * p0 + factor * p).log_()
        gap = log_p - log_m
        expected = _expected(p, gap)
        value = factor * expected + share * _expected(p0, log_p0 - log_m)
    if not with_slope:
        return value, p
    return value, factor * torch.where(p > 0, p * (gap - expected[:, None]), 0)


def _expected(p: Tensor, values: Tensor) -> Tensor:
    """Σ p · values, where outcomes of probability 0 count nothing even if their value is infinite."""
    return torch.where(p > 0, p * values, 0).sum(-1)
