"""What the model thought of the training rows when the task began, whatever it has learned since."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import torch

from retain.functional.tiled_head import Head, log_probs
from retain.models import params, passes


class StartScores:
    """Loss of supervised tokens under the weights that the task began with.

    Where LoRA alone learns the forward pass runs without the adapters, else with the starting weights in place of the
    trainable ones. `keep` stores the losses of rows that will come back, known again by their content, since rows are
    shuffled and padded anew; other rows are asked of the model each time.
    """

    def __init__(self, model: Any, start: params.Tensors) -> None:
        self._model = model
        self._without_adapters = params.begins_at_base(model, start)
        learning = {} if self._without_adapters else params.trainable(model)
        # a start held in full precision must meet its frozen neighbours in theirs
        self._weights = {name: start[name].to(p.dtype) for name, p in learning.items()}
        self._kept: dict[bytes, torch.Tensor] = {}

    def keep(self, batches: Iterable[tuple[dict[str, Any], torch.Tensor]]) -> list[torch.Tensor]:
        """Store the losses of batches (inputs, labels); gives those of each sequence, [its supervised tokens]."""
        found = []
        for inputs, labels in batches:
            losses = self._ask(inputs, labels).cpu()
            owner = sequences(inputs, labels)
            of_token = owner[:, 1:][labels[:, 1:] != -100].cpu()
            for number, key in enumerate(_keys(inputs, labels, owner)):
                self._kept[key] = losses[of_token == number]
                found.append(self._kept[key])
        return found

    def losses(self, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Loss [N] in nats of the supervised tokens of a micro-batch, in reading order, without gradient."""
        if self._kept:
            keys = _keys(inputs, labels, sequences(inputs, labels))
            parts = [self._kept[key] for key in keys if key in self._kept]
            if len(parts) == len(keys):
                return torch.cat(parts).to(labels.device)
        return self._ask(inputs, labels)

    def _ask(self, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        model = self._model
        with torch.no_grad(), passes.precision(labels.device), params.evaluating(model):
            if self._without_adapters:
                with params.adapters_off(model):
                    hidden = params.hidden_states(model, inputs)
            else:
                hidden = params.hidden_states(model, inputs, self._weights)
            learned = labels[:, 1:] != -100
            head = Head(*params.head(model, self._weights), *params.logit_rules(model))
            return -log_probs(hidden[:, :-1][learned], head, labels[:, 1:][learned])[0]


def sequences(inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Number [B, T] of the sequence that each token belongs to: its row's, or its part's where rows are packed."""
    positions = inputs.get("position_ids")
    if positions is None or positions.shape != labels.shape:
        return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    begins = (positions == 0) & _real(inputs, labels)
    begins[:, 0] = True
    return begins.flatten().cumsum(0).view_as(labels) - 1


def _real(inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(labels, dtype=torch.bool) if mask is None or mask.shape != labels.shape else mask.bool()


def _keys(inputs: dict[str, Any], labels: torch.Tensor, owner: torch.Tensor) -> list[bytes]:
    """What each sequence is known by: its tokens and which of them are learned, without padding.

    The label of the first token does not count, as nothing predicts it: flattened batches have none there.
    """
    content = torch.stack([inputs["input_ids"], labels]).cpu()
    owner, real = owner.cpu(), _real(inputs, labels).cpu()
    found = []
    for number in range(int(owner.max()) + 1):
        mine = content[:, (owner == number) & real]
        mine[1, :1] = -100
        found.append(blake2b(mine.numpy().tobytes(), digest_size=16).digest())
    return found
