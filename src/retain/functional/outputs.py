"""Whole rows of logits where they are needed, a few positions at a time, never [N, V] at once.

`tiled_head` gives what can be had without them; this is for the outputs themselves: their k likeliest tokens and
their size. The logits are h Wᵀ + b, times the scale or inside the soft cap of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retain.functional import divergence
from retain.functional.tiled_head import Head, tile_size


def logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits [N, V] of hidden states [N, H], in at least float32; differentiable in `hidden` and the head."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(dtype)
        found = torch.nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), bias)
    if head.scale != 1:
        found = found * head.scale
    return found if head.softcap is None else head.softcap * torch.tanh(found / head.softcap)


@torch.no_grad()
def top_k(hidden: Tensor, head: Head, k: int, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens at every position: ids [N, k] and log-probabilities [N, k], of the whole vocabulary.

    Args:
        hidden: [N, H].
        k: 1 to V.
        tile: positions at once; the result does not depend on it.

    Raises:
        ConfigError: k out of range.
    """
    found = [divergence.top_k(logits(part, head), k) for part in hidden.split(tile or tile_size(head.weight))]
    if not found:
        return hidden.new_empty(0, k, dtype=torch.long), hidden.new_empty(0, k)
    ids, values = zip(*found)
    return torch.cat(ids), torch.cat(values)


def centred_norm(hidden: Tensor, head: Head, tile: int | None = None) -> Tensor:
    """Σ over positions of ‖z − mean(z)‖², a scalar that knows nothing of a constant added to all logits.

    Differentiable in `hidden` and the head; the backward pass makes the logits of each tile again.

    Args:
        hidden: [N, H].
        tile: positions at once; the result does not depend on it.
    """

    def part(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = logits(states, Head(weight, bias, head.scale, head.softcap))
        return (z - z.mean(-1, keepdim=True)).square().sum()

    tiles = hidden.split(tile or tile_size(head.weight))
    parts = [
        checkpoint(part, states, head.weight, head.bias, use_reentrant=False, preserve_rng_state=False)
        for states in tiles
    ]
    return torch.stack(parts).sum()
