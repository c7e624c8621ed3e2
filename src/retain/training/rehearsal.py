"""The passes of a training on a model without weights: a micro-batch, an update, an importance, a look."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from retain.errors import ConfigError
from retain.functional.tiled_head import Head, divergence, log_probs
from retain.methods.base import Stack
from retain.methods.context import Run
from retain.models import params
from retain.models.weightless import Cost, Weightless, kind_of

#: Tokens and words of a tile of logits that TRL's fused head holds (`trl.kernels.chunked_logprob`).
TILE = (4096, 32768)
#: Bytes held, moved and mapped anew per logit, forward and backward: where there is Triton the tile alone; otherwise
#: its float32 steps one by one (`_forward_tile`, `_backward_tile`).
TILE_BYTES = {True: (2, 6, 0), False: (30, 175, 70)}
#: Bytes of state per trained weight of optimizers that only step on a GPU: one or two moments of 8 or 4 bits.
STATES = {"lion_8bit": 1, "lion": 4, "8bit": 2, "4bit": 1}


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows, tokens of the longest row, learned tokens of all rows, rows that a teacher reads."""

    rows: int
    width: int
    learned: int
    taught: int = 0


class Rehearsal:
    """The model of a run as its methods prepare it, and what its passes cost.

    Args:
        weightless: the model; it is prepared in place.
        stack: the methods.
        run: of the first task.
        half: type that autocast computes in, None for none.
        checkpointing: whether activations are computed again in the backward pass.
        triton: whether the training runs where TRL's head has Triton kernels.
    """

    def __init__(
        self,
        weightless: Weightless,
        stack: Stack,
        run: Run,
        half: torch.dtype | None = None,
        checkpointing: bool = False,
        triton: bool = False,
    ) -> None:
        self.half, self.triton = half, triton
        weightless.model = stack.prepare_model(weightless.model, run)
        weightless.begin()
        self.weightless = weightless
        self.trainable, self.parameters = params.counts(weightless.model)
        weightless.model.train()
        if checkpointing:
            params.causal(weightless.model).gradient_checkpointing_enable({"use_reentrant": False})

    def micro_batch(self, batch: Batch) -> Cost:
        """Forward and backward of a micro-batch, with its head and its teacher."""

        def work(model: Any) -> None:
            with self._autocast():
                hidden = params.hidden_states(model, _inputs(batch.rows, batch.width))
                loss = hidden.sum()
                if batch.taught:
                    with torch.no_grad(), _base(model):
                        past = params.hidden_states(model, _inputs(batch.taught, batch.width))
                    rows = slice(0, max(1, batch.learned * batch.taught // batch.rows))
                    head = Head(*params.head(model), *params.logit_rules(model))
                    loss = loss + divergence(hidden.flatten(0, 1)[rows], head, past.flatten(0, 1)[rows], head).sum()
            loss.backward()

        return self.weightless.count(work) + self._head(batch.learned)

    def _head(self, learned: int) -> Cost:
        """Forward, again, and backward of TRL's tiled head over `learned` tokens."""
        weight, _ = params.head(self.weightless.model)
        words, width = weight.shape
        held, moved, mapped = TILE_BYTES[self.triton]
        trained = weight.requires_grad
        cost = Cost()
        product = 2 * learned * words * width
        narrow = kind_of(self.half or weight.dtype)
        wide = narrow if self.triton else "float32"  # of the gradients, which are added up in float32
        cost.operations = Counter({(narrow, product, 0): 2}) + Counter({(wide, product, 0): 2 if trained else 1})
        cost.operations["float32", 0, learned * words * moved] += 1
        cost.mapped = learned * words * mapped
        tile = min(learned, TILE[0]) * min(words, TILE[1]) * held
        cost.held["head"] = tile + 4 * width * (learned + (words if trained else 0))
        return cost

    def update(self, args: Any, notes: list[str]) -> Cost:
        """Clipping and a step of the optimizer that `args` (a TrainingArguments) asks for, with the states it makes.

        What had to be assumed is added to `notes`.

        Raises:
            ConfigError: the optimizer's package is not installed.
        """
        from transformers import Trainer

        name = str(getattr(args.optim, "value", args.optim))
        try:
            optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
            return self._step(optimizer, settings, args.max_grad_norm)
        except ImportError as error:
            raise ConfigError(f"train.optim: {name} cannot be used here ({str(error).rstrip('.')}).") from None
        except Exception:  # made for one model only, or whatever its own kernels say to tensors without values
            cost = self._step(torch.optim.SGD, {"lr": 0.0}, args.max_grad_norm)
            each = next((size for part, size in STATES.items() if part in name), 8)
            cost.held["states"] = each * self.trainable
            notes.append(f"{name} is taken to hold {each} bytes per trained weight")
            return cost

    def _step(self, optimizer: type, settings: dict[str, Any], clip: float) -> Cost:
        def work(model: Any) -> Any:
            learning = [p for p in model.parameters() if p.requires_grad]
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)
            if clip:
                torch.nn.utils.clip_grad_norm_(learning, clip)
            made = optimizer(learning, **settings)
            made.step()
            return made

        return self.weightless.count(work)

    def importance(self, batch: Batch, quantised: bool = False) -> Cost:
        """One batch of a Fisher estimate: the gradients of all weights that get one are there at once.

        Under LoRA those are the weights below the adapters; of quantised ones there is one at a time.
        """

        def work(model: Any) -> None:
            bases = [] if quantised else [pair.base for pair in params.lora_pairs(model).values()]
            weights = [*bases, *params.outside_lora(model).values()] or list(params.trainable(model).values())
            for base in bases:
                base.requires_grad_(True)
            with self._autocast():
                hidden = params.hidden_states(model, _inputs(batch.rows, batch.width)).flatten(0, 1)[: batch.learned]
                head = Head(*params.head(model), *params.logit_rules(model))
                labels = torch.zeros(len(hidden), dtype=torch.long)
                total = log_probs(hidden, head, labels)[0].sum()
            gradients = torch.autograd.grad(total, weights, allow_unused=True)
            for base in bases:
                base.requires_grad_(False)
            del gradients

        return self.weightless.count(work)

    def look(self, rows: int, width: int) -> Cost:
        """A forward pass that predicts one token of every row. Half-precision copies of weights are there already."""

        def work(model: Any) -> None:
            with torch.no_grad(), self._autocast(), _base(model), params.evaluating(model):
                hidden = params.hidden_states(model, _inputs(rows, width))
                torch.nn.functional.linear(hidden[:, -1], *params.head(model))

        return self.weightless.count(work, casts=False)

    def _autocast(self) -> Any:
        return torch.autocast("cpu", self.half, enabled=self.half is not None)


def _inputs(rows: int, width: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, width, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _base(model: Any) -> Any:
    return params.adapters_off(model) if params.lora_pairs(model) else nullcontext()
