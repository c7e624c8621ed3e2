"""Micro-batches of tiny models for methods that weigh tokens, and the dense truth about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import token_batch

from retain.functional.tiled_head import Head
from retain.methods.context import Batch, Run, Tokens
from retain.models import params


def labelled(rows: int = 4, length: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length] and labels: answers of different lengths behind prompts."""
    ids = token_batch(rows, length, seed)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row % 3] = -100
    return ids, labels


def batch_of(model: Any, ids: torch.Tensor, labels: torch.Tensor, source: Any = None) -> Batch:
    """A micro-batch as the trainer makes it, with the graph of its hidden states."""
    source = torch.zeros(len(ids), dtype=torch.long) if source is None else torch.tensor(source)
    return Batch({"input_ids": ids}, labels, params.hidden_states(model, {"input_ids": ids}), source)


def tokens_of(model: Any, ids: torch.Tensor, labels: torch.Tensor, source: Any = None) -> Tokens:
    """Its supervised tokens."""
    head = Head(*params.head(model), *params.logit_rules(model))
    return Tokens.of(batch_of(model, ids, labels, source), head)


def run_of(model: Any, **fields: Any) -> Run:
    """A run that begins with the model as it is; nothing is known of its rows."""
    return Run(Path(), model=model, start=params.snapshot(params.trainable(model)), say=lambda line: None, **fields)


def dense_logits(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All logits [N, V] of the positions that predict a supervised token, by the model's own forward pass."""
    return model(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100]


def targets(labels: torch.Tensor) -> torch.Tensor:
    """The supervised tokens [N]."""
    return labels[:, 1:][labels[:, 1:] != -100]


def weighted_gradients(model: Any, weights: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> dict:
    """Gradient of Σ w · CE by torch's own cross-entropy, by parameter name."""
    losses = torch.nn.functional.cross_entropy(dense_logits(model, ids, labels), targets(labels), reduction="none")
    learning = params.trainable(model)
    return dict(zip(learning, torch.autograd.grad((weights.detach() * losses).sum(), list(learning.values()))))
