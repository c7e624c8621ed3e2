"""Distributions over the next token, averaged over models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from retain.errors import ConfigError

Average = Literal["probabilities", "logits"]
Name = TypeVar("Name")


def mixed(logits: Tensor, weights: Sequence[float], average: Average = "probabilities") -> Tensor:
    """Log-probabilities of a mixture of n models.

    probabilities: log Σ wᵢ pᵢ, the mixture of experts: a token that one model is sure of stays likely.
    logits: log softmax Σ wᵢ zᵢ, the normalised product Π pᵢ^wᵢ (Hinton 2002, a product of experts): a token that one
    model rules out stays out. With weights that sum to 1 it does not matter that logits are defined up to a constant.

    Args:
        logits: [n, …, V].
        weights: n numbers that sum to 1.

    Returns:
        [..., V], in float32 at least; with one model its log-softmax.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scale = torch.tensor(list(weights), dtype=wide.dtype, device=wide.device).reshape(-1, *[1] * (wide.ndim - 1))
    if average == "logits":
        return torch.log_softmax((scale * wide).sum(0), dim=-1)
    return torch.logsumexp(torch.log_softmax(wide, dim=-1) + scale.log(), dim=0)


def shares(weights: Mapping[Name, float], top: int | None = None) -> dict[Name, float]:
    """The largest `top` weights, divided by their sum, the largest first; those that are zero are left out.

    Raises:
        ConfigError: a weight that is negative or no number, none above zero, or `top` below 1.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"ensemble: weight {weight} of '{name}'; allowed: 0 or more.")
    if top is not None and top < 1:
        raise ConfigError(f"ensemble: top = {top} given; allowed: 1 or more.")
    largest = sorted((n for n in weights if weights[n] > 0), key=lambda name: -weights[name])[:top]
    if not largest:
        raise ConfigError("ensemble: no weight is above zero. Give one that is.")
    total = sum(weights[name] for name in largest)
    return {name: weights[name] / total for name in largest}
