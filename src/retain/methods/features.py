"""Features — keeps the last hidden states on old rows where they were.

    L = L_new + strength · mean_{paid > 0} relu(distance of (ĥ − μ)/σ from the range of (h − μ)/σ)

(GeRe, 2025, arXiv:2508.04676.) h = states of the model that the run began with, ĥ = those of the model in
training, on the same tokens of old rows, `batch_size` of them per step, drawn by seed and step. μ, σ = mean and
deviation of h per dimension; the ranges are: up to −1, between, from 1 on. A state pays only for leaving its range,
so 2 bits per entry are all that is stored. `loss: mse` is the plain mean of ((ĥ − h)/σ)² over all entries.
Deviations from the paper: distances are in units of σ, as a strength should mean the same on every model. Old rows
    are the user's, else the model's own (1000 texts of SlimPajama there), taken where they are supervised. Its
    cross-entropy on them, ½ (CE_new + CE_old), is `replay` with a fraction of 0.5, which takes the same rows.
Needs: old rows at every step: the user's, or written by the model.
Cost: a forward and backward pass over `batch_size` rows per step; two forward passes over `samples` rows, once;
    `bits` per entry on disk, 1.2 MB for 64 rows of 128 tokens of a state of 576.
Combine with: replay, distill, lora, ewc, freeze, interpolate.   Conflicts: none.
Tune: `strength` 10–100 (the paper: 100) with `margin`, 1–30 with `mse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field
from safetensors.torch import load_file, save_file

from retain.errors import ConfigError, DataError, RunError
from retain.functional import stored_states
from retain.methods.base import Method, Strength
from retain.methods.context import Batch, Run
from retain.models import params, passes


class Features(Method):
    """Distance of hidden states to stored ones (GeRe)."""

    family = "functions"
    paper = "arXiv:2508.04676"
    repeats_batches = True  # to know where a step begins and how many tokens it has; no batch is run again

    class Config(Strength):
        strength: float = Field(30.0, ge=0)
        """Weight of the loss; 0 is off."""
        loss: Literal["margin", "mse"] = "margin"
        """Pay for leaving a range of μ ± σ, or for every distance."""
        samples: int = Field(256, ge=1)
        """Old rows whose states are stored, at most."""
        batch_size: int = Field(4, ge=1)
        """Old rows per step, over all processes."""
        bits: Literal[2, 4, 8, 16] | None = None
        """Bits per entry of a stored state: 8 with `mse` unless given; always 2 with `margin`, which lose nothing."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        c, path = self.config, run.shared_folder / "features" / "states.safetensors"
        if c.loss == "margin" and c.bits not in (None, 2):
            raise ConfigError(f"methods.features.bits: {c.bits} has no effect with 'margin'. Remove it, or take 'mse'.")
        self._bits = 2 if c.loss == "margin" else (c.bits or 8)
        self._rows = run.whole_rows(run.old_rows(model, c.samples))
        known = path.is_file() and (run.restored or run.task_index > 1)
        PartialState().wait_for_everyone()  # all have looked before one writes
        self._kept = load_file(path) if known else self._store(model, run, path)
        counts = [sum(label != -100 for label in labels[1:]) for labels in self._rows["labels"]]
        self._begins = np.concatenate([[0], np.cumsum(counts)])
        if self._begins[-1] != len(self._kept["codes"]):
            raise RunError(
                f"{path}: states of {len(self._kept['codes'])} tokens, but the old rows have {self._begins[-1]}. "
                "Give the same old rows, or start a new run."
            )

    def _store(self, model: Any, run: Run, path: Path) -> params.Tensors:
        """The states of all old rows in a few bits, with μ, σ and the ends of every dimension."""

        def states() -> Iterator[torch.Tensor]:
            size = self.config.batch_size
            batches = run.batches(self._rows, size)
            for inputs, labels in run.track(batches, "states of old rows", -(-len(self._rows) // size)):
                with torch.no_grad():
                    yield params.hidden_states(model, inputs)[:, :-1][labels[:, 1:] != -100]

        moments = stored_states.Moments()
        for part in states():
            moments.add(part)
        if not moments.count:
            raise DataError("methods.features: the old rows have no supervised token. Give rows with answers or text.")
        kept = {"mean": moments.mean, "deviation": moments.deviation, "low": moments.low, "high": moments.high}
        kept = {name: t.float() for name, t in kept.items()}
        codes = []
        for part in states():
            if self.config.loss == "margin":
                found = stored_states.ranges(part, kept["mean"], kept["deviation"])
            else:
                found = stored_states.quantise(part, kept["low"], kept["high"], self._bits)
            codes.append(stored_states.pack(found, self._bits).cpu())
        kept = {name: t.cpu() for name, t in kept.items()} | {"codes": torch.cat(codes)}
        if PartialState().is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".part")
            save_file(kept, partial)
            partial.replace(path)
        return kept

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        if len(run.step_batches) != 1:  # once per step
            return None
        state = PartialState()
        drawn = np.random.default_rng([run.seed, run.task_index, run.step]).permutation(len(self._rows))
        mine = drawn[: self.config.batch_size][state.process_index :: state.num_processes]
        total, count = self._distance(run, mine)
        paying = float(run.reduce(count.float()))
        if total is None:
            return None
        # the trainer divides by the tokens of the step: this is the mean over paying entries of all processes
        return self.config.strength * total / max(paying, 1.0) * run.step_tokens

    def _distance(self, run: Run, rows: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(sum, entries that count) of the loss on some rows."""
        device = params.causal(run.model).get_input_embeddings().weight.device
        if not len(rows):
            return None, torch.zeros((), device=device)
        ((inputs, labels),) = run.batches(self._rows.select(rows), len(rows))
        with passes.precision(device):  # as the stored states were made
            states = params.hidden_states(run.model, inputs)[:, :-1][labels[:, 1:] != -100]
        kept = {name: t.to(device) for name, t in self._kept.items() if name != "codes"}
        packed = torch.cat([self._kept["codes"][self._begins[row] : self._begins[row + 1]] for row in rows]).to(device)
        codes = stored_states.unpack(packed, self._bits, states.shape[1])
        if self.config.loss == "margin":
            return stored_states.margin(states, codes, kept["mean"], kept["deviation"])
        past = stored_states.dequantise(codes, kept["low"], kept["high"], self._bits)
        return stored_states.squared(states, past, kept["deviation"])
