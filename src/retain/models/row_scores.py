"""What a model makes of single rows: their loss, and the gradient that each would give alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from retain.functional.tiled_head import Head, log_probs
from retain.models import params, passes
from retain.models.start_scores import sequences


def row_losses(model: Any, batches: Iterable[passes.Batch]) -> np.ndarray:
    """Mean −log p over the supervised tokens of each row, in nats, in the order of the batches, without gradient.

    A row without supervised tokens has 0. Rows flattened by padding-free collation are told apart by their positions.
    """
    found: list[torch.Tensor] = []
    for inputs, labels in batches:
        owner = sequences(inputs, labels)
        learned = labels[:, 1:] != -100
        with torch.no_grad(), passes.precision(labels.device):
            hidden = params.hidden_states(model, inputs)[:, :-1][learned]
            head = Head(*params.head(model), *params.logit_rules(model))
            losses = -log_probs(hidden, head, labels[:, 1:][learned])[0].cpu().double()
        mine = owner[:, 1:][learned].cpu()
        number = int(owner.max()) + 1
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, mine, losses)
        found.append(sums / torch.bincount(mine, minlength=number).clamp(min=1))
    return torch.cat(found).numpy() if found else np.empty(0)


def row_gradient_norms(model: Any, batches: Iterable[passes.Batch]) -> np.ndarray:
    """‖∇ mean −log p‖ over everything that is trained, of each row alone: one backward pass for every row.

    Args:
        batches: of one row each.
    """
    learning = list(params.trainable(model).values())
    found = []
    for inputs, labels in batches:
        gradients, _, _ = passes.gradients(model, learning, [(inputs, labels)], _mean_loss)
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        found.append(float(norms.norm()))
    return np.array(found, np.float64)


def right_logits(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Σ logit of each supervised token, as the model gives it (scaled and capped), with gradient."""
    learned = labels[:, 1:] != -100
    ids, hidden = labels[:, 1:][learned], params.hidden_states(model, inputs)[:, :-1][learned]
    (weight, bias), (scale, cap) = params.head(model), params.logit_rules(model)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden.to(wide) * weight[ids].to(wide)).sum(-1)
    logits = scale * (logits if bias is None else logits + bias[ids].to(wide))
    return (logits if cap is None else cap * torch.tanh(logits / cap)).sum()


def row_keys(rows: Any) -> list[str]:
    """What each tokenised row is known by: its tokens, and which of them are learned."""
    return [
        hashlib.blake2b(
            np.asarray(row["input_ids"], np.int64).tobytes() + np.asarray(row["labels"], np.int64).tobytes(),
            digest_size=16,
        ).hexdigest()
        for row in rows.select_columns(["input_ids", "labels"])
    ]


def _mean_loss(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    learned = labels[:, 1:] != -100
    hidden = params.hidden_states(model, inputs)[:, :-1][learned]
    head = Head(*params.head(model), *params.logit_rules(model))
    return -log_probs(hidden, head, labels[:, 1:][learned])[0].sum() / max(1, int(learned.sum()))
