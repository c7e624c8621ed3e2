"""Key layers — old rows train chosen layers only, while new rows train everything.

    g_i = ∇_i L_new + strength · ∇_i L_old  for i in a key layer,   g_i = ∇_i L_new  elsewhere

g_i = gradient of weight i, L_new and L_old = cross-entropy of new and of old rows. With `replay` the old rows are those
that it mixes in: both losses are sums over their tokens in a step, divided by the number of all of them, so that
strength 1 is replay itself in the key layers. Without it the method draws `batch_size` old rows at each step, L_old is
their mean, and old rows are those the user gives as `old`, otherwise rows the model writes itself; rows of earlier
tasks come with `replay` alone.
Deviations from the paper: there is none. Only the cross-entropy of old rows is kept to the key layers: terms of other
    methods on these rows reach all weights, and token weights of other methods act on new rows alone.
Needs: old rows at every step: the user's, or written by the model.
Cost: with `replay`, one more forward pass over the replayed rows of a step and a backward pass to the lowest key layer,
    without it the same over the rows drawn; no copy of weights. `choose: auto` adds one pass over `samples` rows at the
    start of a task.
Combine with: replay, lora, distill, ewc, freeze, interpolate; list it before what edits gradients, so that its part is
    edited too.   Conflicts: none.
Tune: `share` 0.25–0.5; `choose: top` where answers are to be kept, `auto` otherwise. The chosen layers are printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field, model_validator

from retain.errors import ConfigError
from retain.methods.base import Method, Strength
from retain.methods.context import Batch, Run, Tokens, answer_loss, repeated
from retain.models import params, passes


class KeyLayers(Method):
    """Replay that trains chosen layers."""

    family = "replay"
    paper = "none"
    edits_gradients = True
    repeats_batches = True
    boosts = True

    class Config(Strength):
        strength: float = Field(1.0, ge=0)
        """Weight of the old rows; 0 is off."""
        share: float = Field(0.25, gt=0, le=1)
        """Share of the layers that are key layers; at least one is."""
        choose: Literal["auto", "top", "bottom"] = "auto"
        """Which: those with the largest gradient of the loss of old rows when the task starts, the top, the bottom."""
        layers: list[int] = []
        """Key layers by number, in place of a share: 0 is the lowest, −1 the highest."""
        patterns: list[str] = []
        """Regular expressions on parameter names, in place of a share or beside `layers`."""
        samples: int = Field(64, ge=1)
        """Old rows that `auto` measures on, at most."""
        batch_size: int = Field(8, ge=1)
        """Old rows of a step where there is no `replay`, over all processes."""
        rows: int = Field(256, ge=1)
        """Old rows to draw from where there is no `replay`, at most."""

        @model_validator(mode="after")
        def _one_choice(self) -> KeyLayers.Config:
            if (self.layers or self.patterns) and self.model_fields_set & {"share", "choose", "samples"}:
                raise ValueError(
                    "`layers` and `patterns` stand in place of `share`, `choose` and `samples`; remove one"
                )
            return self

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._layers: list[int] = []

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        c = self.config
        self._replayed = run.has_replay
        rows = run.replay if self._replayed else run.tokenise(run.old_rows(model, c.rows))
        if len(rows) == 0:
            raise ConfigError("methods.key_layers: no old row is left after tokenising. Give `old:` other rows.")
        self._rows = rows
        if self._replayed and (unused := c.model_fields_set & {"batch_size", "rows"}):
            run.say(f"key_layers: {', '.join(sorted(unused))} has no effect, as `replay` gives the old rows.")
        learning = params.trainable(model)
        blocks = self._blocks(model)
        chosen = set(self._by_name(learning))
        if c.layers or not c.patterns:
            if not (run.restored and self._layers):
                self._layers = sorted(self._numbers(model, blocks, run))
            chosen |= {name for i in self._layers for name in blocks[i]}
        self._names = [name for name in learning if name in chosen]
        size, total = (sum(learning[name].numel() for name in names) for names in (self._names, learning))
        which = (
            f"layers {', '.join(map(str, self._layers))} of {len(blocks)}" if self._layers else "what `patterns` say"
        )
        run.say(f"key_layers: old rows train {which}, {size:,} of {total:,} trainable parameters ({size / total:.1%}).")

    def _blocks(self, model: torch.nn.Module) -> list[list[str]]:
        """Names of the parameters that learn in each layer, bottom first."""
        names = {id(p): name for name, p in params.trainable(model).items()}
        return [[names[id(p)] for p in b.parameters() if id(p) in names] for b in params.decoder_layers(model)]

    def _by_name(self, learning: dict[str, Any]) -> Iterator[str]:
        for pattern in self.config.patterns:
            found = [name for name in learning if re.search(pattern, name)]
            if not found:
                raise ConfigError(
                    f"methods.key_layers.patterns: '{pattern}' matches no parameter that learns. "
                    f"Names look like '{next(iter(learning))}'."
                )
            yield from found

    def _numbers(self, model: torch.nn.Module, blocks: list[list[str]], run: Run) -> set[int]:
        c, learning = self.config, [i for i, names in enumerate(blocks) if names]
        if c.layers:
            for number in c.layers:
                if not -len(blocks) <= number < len(blocks) or not blocks[number]:
                    raise ConfigError(
                        f"methods.key_layers.layers: {number} is no layer that learns. "
                        f"Those that do: {', '.join(map(str, learning)) or 'none'}."
                    )
            return {number % len(blocks) for number in c.layers}
        if not learning:
            raise ConfigError("methods.key_layers: no layer learns. Freeze less, or set `patterns`.")
        count = max(1, round(c.share * len(learning)))
        if c.choose == "bottom":
            return set(learning[:count])
        if c.choose == "top" or count == len(learning):
            return set(learning[-count:])
        return set(sorted(learning, key=self._slopes(model, blocks, run).__getitem__)[-count:])

    def _slopes(self, model: torch.nn.Module, blocks: list[list[str]], run: Run) -> list[float]:
        """Squared length of the gradient of the old rows' loss in each layer."""
        learning = params.trainable(model)
        drawn = np.random.default_rng([run.seed, run.task_index]).permutation(len(self._rows))[: self.config.samples]
        ranks = PartialState()
        batches = self._batches(run, drawn[ranks.process_index :: ranks.num_processes], 8)
        with params.evaluating(model):
            found, _, _ = passes.gradients(model, list(learning.values()), batches, answer_loss, run.reduce)
        squares = {name: float(g.double().square().sum()) for name, g in zip(learning, found)}
        return [sum(squares[name] for name in names) for names in blocks]

    def _batches(self, run: Run, chosen: Any, size: int) -> Iterator[passes.Batch]:
        return run.batches(self._rows.select(chosen), size) if len(chosen) else iter(())

    def token_weights(self, tokens: Tokens, run: Run) -> torch.Tensor | None:
        if not self._replayed:
            return None
        check_rows(tokens.batch)
        return (tokens.source == 0).to(tokens.hidden.dtype)

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        learning = params.trainable(model)
        key = [learning[name] for name in self._names if learning[name].grad is not None]  # not what others closed
        if not key:
            run.log(f"loss/{self.name}", 0.0)
            return
        device = key[0].device
        if self._replayed:
            # as the trainer ran them, in training mode and with the same random draws
            with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
                found, loss, _ = passes.gradients(model, key, replayed(run, device), answer_loss, run.reduce)
            divide = run.step_tokens
        else:
            ranks = PartialState()
            drawn = np.random.default_rng([run.seed, run.task_index, run.step]).permutation(len(self._rows))
            mine = drawn[: self.config.batch_size][ranks.process_index :: ranks.num_processes]
            with params.evaluating(model):
                batches = self._batches(run, mine, max(1, len(mine)))
                found, loss, divide = passes.gradients(model, key, batches, answer_loss, run.reduce)
        strength = self.boost * self.config.strength
        with torch.no_grad():
            for parameter, slope in zip(key, found):
                if parameter.grad is not None:
                    parameter.grad.add_(slope, alpha=strength / max(divide, 1))
        run.log(f"loss/{self.name}", strength * loss / max(divide, 1))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"layers": torch.tensor(self._layers)} if self._layers else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._layers = state["layers"].tolist() if "layers" in state else []


def check_rows(batch: Batch) -> None:
    """Refuse rows whose origin is lost."""
    if len(batch.source) != len(batch.labels):
        raise ConfigError(
            "methods.key_layers: rows are flattened by padding-free packing, so new and replayed ones cannot be told "
            "apart. Set `padding_free: false`."
        )


def replayed(run: Run, device: torch.device) -> Iterator[passes.Batch]:
    """The micro-batches of a step with labels on their replayed rows alone; those without any are left out."""
    for batch in repeated((b for b in run.step_batches if bool((b.source > 0).any())), device):
        new = (batch.source == 0).to(batch.labels.device)
        yield batch.inputs, batch.labels.masked_fill(new[:, None], -100)
