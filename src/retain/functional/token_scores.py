"""Scores of supervised tokens that weighting methods ask for, tiled over the tokens as in `tiled_head`.

Nothing here holds the logits of all tokens: only [tile, V] is alive at any time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retain.errors import ConfigError, ModelError
from retain.functional import tiled_head
from retain.functional.tiled_head import Head

#: Losses in nats are counted between these, in bins of equal ratio.
LEAST_LOSS, MOST_LOSS = 1e-6, 1e3
BINS = 4096


def top_entropy(hidden: Tensor, head: Head, k: int = 20, *, tile: int | None = None) -> Tensor:
    """Entropy of the k likeliest tokens, renormalised among themselves, over ln k (EAFT, arXiv:2601.02151).

    1 where they are equally likely, 0 where one of them has all the probability. A vocabulary of fewer than k tokens
    is taken whole. Without gradient.

    Args:
        hidden: [N, H] hidden states of the supervised positions.
        head: the output head.
        k: tokens that count, at least 2.
        tile: tokens per tile; the result does not depend on it.

    Returns:
        [N], between 0 and 1.

    Raises:
        ConfigError: k below 2.
        ModelError: shapes that do not fit together.
    """
    if k < 2:
        raise ConfigError(f"top_entropy.k: {k} given; allowed: 2 or more.")
    with torch.no_grad():
        hidden, weight, bias = tiled_head._prepare(hidden, head, "top_entropy")
        k = min(k, weight.shape[0])
        result = hidden.new_empty(len(hidden), dtype=tiled_head._wide(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiled_head._tiles(len(hidden), tile or tiled_head.tile_size(weight)):
                logits = tiled_head._logits(hidden[rows], weight, bias, head.scale, head.softcap)
                p = torch.softmax(logits.topk(k, dim=-1).values, dim=-1)
                result[rows] = torch.special.entr(p).sum(-1)
        return result.div_(math.log(k)).clamp_(0, 1)


def label_margin(hidden: Tensor, head: Head, labels: Tensor, *, tile: int | None = None) -> Tensor:
    """How far the logit of each label is above the mean logit of the vocabulary, z_y − z̄.

    Differentiable in `hidden`, `head.weight` and `head.bias`. Cross-entropy with label smoothing ε is
    −log p_y + ε (z_y − z̄), as the normaliser cancels. Without a soft cap z̄ = scale (h · W̄ + b̄), W̄ and b̄ the means
    over the vocabulary, so no logits are made at all; with one they are made tile by tile.

    Args:
        hidden: [N, H] hidden states of the supervised positions.
        head: the output head.
        labels: [N] token ids.
        tile: tokens per tile where there is a soft cap; the result does not depend on it.

    Returns:
        [N], in nats.

    Raises:
        ModelError: shapes that do not fit together.
    """
    hidden, weight, bias = tiled_head._prepare(hidden, head, "label_margin")
    if labels.shape != hidden.shape[:1]:
        raise ModelError(
            f"label_margin: labels have shape {tuple(labels.shape)} for {len(hidden)} hidden states; allowed: [N]. "
            "Select the supervised positions of both."
        )
    if head.softcap is not None:
        return _Margin.apply(
            hidden, weight, bias, labels, head.scale, head.softcap, tile or tiled_head.tile_size(weight)
        )
    wide = tiled_head._wide(hidden.dtype)
    margin = (hidden.to(wide) * (weight[labels].to(wide) - weight.mean(0, dtype=wide))).sum(-1)
    if bias is not None:
        margin = margin + bias[labels].to(wide) - bias.mean(dtype=wide)
    return margin * head.scale


class _Margin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, tile):
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = (scale, softcap, tile)
        result = hidden.new_empty(len(hidden), dtype=tiled_head._wide(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiled_head._tiles(len(hidden), tile):
                logits = tiled_head._logits(hidden[rows], weight, bias, scale, softcap)
                result[rows] = logits.gather(1, labels[rows, None])[:, 0] - logits.mean(-1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden, weight, bias, labels = ctx.saved_tensors
        scale, softcap, tile = ctx.options
        gradients = tiled_head._Gradients(ctx, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiled_head._tiles(len(hidden), tile):
                logits = tiled_head._logits(hidden[rows], weight, bias, scale, softcap)
                slope = torch.full_like(logits, -1 / logits.shape[-1])
                slope.scatter_add_(1, labels[rows, None], torch.ones_like(slope[:, :1]))
                gradients.add(rows, slope * upstream[rows, None], logits, scale, softcap)
        return (*gradients.result(), None, None, None, None)


def loss_counts(losses: Tensor) -> Tensor:
    """How many losses fall into each bin, [BINS] float64; counts of several parts of the data can be added."""
    places = (losses.double().clamp(LEAST_LOSS, MOST_LOSS).log() - math.log(LEAST_LOSS)) / _RATIO
    return torch.bincount(places.long().clamp_(max=BINS - 1), minlength=BINS).double()


def counted_quantile(counts: Tensor, share: float) -> float | None:
    """The loss that `share` of the counted ones do not exceed, to half a percent; None where nothing was counted."""
    total = float(counts.sum())
    if total == 0:
        return None
    steps = counts.cumsum(0)
    place = int(torch.searchsorted(steps, steps.new_tensor([share * total])).clamp_(max=BINS - 1))
    inside = (share * total - float(steps[place] - counts[place])) / max(float(counts[place]), 1.0)
    return LEAST_LOSS * math.exp(_RATIO * (place + min(max(inside, 0.0), 1.0)))


_RATIO = math.log(MOST_LOSS / LEAST_LOSS) / BINS
