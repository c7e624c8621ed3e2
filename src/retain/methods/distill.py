"""Distill — keeps the answers' distribution close to that of the model's own past.

    L = L_new + strength · T² · KL(p⁰_T ‖ p_T)        (Li & Hoiem 2016, arXiv:1606.09282; Hinton 2015, arXiv:1503.02531)

p⁰ = the teacher, p = the model in training, T = temperature; per supervised token, and summed and divided as the
cross-entropy is. On replayed rows the term never opposes the new task. The teacher is the model at the start of the
task; or, with `teacher: ema`, the running average θ̄ ← decay · θ̄ + (1 − decay) · θ of its weights, which follows and
only slows; or, with `frozen`, another model with the same tokenizer, such as the base of a model that was fine-tuned
before. Teachers whose outputs were stored with the rows are `der`. With `rows: text` it reads unlabelled text of your
own, `batch_size` texts per step drawn by seed and step, where the mean over all their tokens is taken.
Deviations from the paper: the teacher is not a second model (unless `frozen`): its forward pass runs with its weights
    in place of the trainable ones (with LoRA, without the adapters). The divergence is computed in tiles from hidden
    states, never as a batch × length × vocabulary tensor. No learning-rate warm-up of new heads.
Needs: nothing but the task's rows; better with `replay`.
Cost: one more forward pass over the rows it applies to, and a forward and backward pass over the texts; one copy of the
    trainable weights, or the other model.
Combine with: replay (then it applies to the replayed rows), lora, ewc, freeze.   Conflicts: none.
Tune: `strength` 0.2–2, `temperature` 1–2. `rows: all` costs new-task score, as the term opposes what is learned.
    `decay` about 1 − 10 / steps; nearer to 1 it is `start`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field

from retain.data.sources import load_texts
from retain.errors import ConfigError
from retain.methods.base import Method
from retain.methods.context import Batch, Run
from retain.methods.distilling import Distilling
from retain.models import params, passes
from retain.models.teachers import Average, Other, Start, Teacher, same_tokenizer

#: Setting → the choice that gives it an effect.
ONLY_WITH = {
    "decay": ("teacher", "ema"),
    "model": ("teacher", "frozen"),
    "dtype": ("teacher", "frozen"),
    "text": ("rows", "text"),
    "batch_size": ("rows", "text"),
}


class Distill(Distilling, Method):
    """Learning without forgetting: the model's own past is the teacher."""

    name = "distill"
    family = "functions"
    paper = "arXiv:1606.09282"

    class Config(Distilling.Config):
        rows: Literal["auto", "all", "new", "replay", "text"] = "auto"
        """Where it applies; auto is the replayed rows when there are any, otherwise all; text is plain texts."""
        text: str | None = None
        """Texts for `rows: text`: a .txt file, or rows with a column `text`."""
        batch_size: int = Field(4, ge=1)
        """Texts per step, over all processes; of `rows: text`."""
        teacher: Literal["start", "ema", "frozen"] = "start"
        """The model at the start of the task, its running average, or another model."""
        decay: float = Field(0.99, gt=0, lt=1)
        """What the average keeps of itself at every step; of `teacher: ema`."""
        model: str | None = None
        """Folder or hub id of the other model; of `teacher: frozen`."""
        dtype: Literal["auto", "float32", "bfloat16"] = "auto"
        """Type in which the other model is held; auto is as it is stored."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.repeats_batches = self.config.rows == "text"  # to know where a step begins; no batch is run again
        self._average: params.Tensors = {}
        for setting, (switch, choice) in ONLY_WITH.items():
            given = getattr(self.config, setting) != self.Config.model_fields[setting].default
            if given and getattr(self.config, switch) != choice:
                raise ConfigError(
                    f"methods.distill.{setting}: has no effect unless `{switch}: {choice}`. Set that, or remove it."
                )
        for setting, (switch, choice) in (("model", ("teacher", "frozen")), ("text", ("rows", "text"))):
            if getattr(self.config, switch) == choice and not getattr(self.config, setting):
                raise ConfigError(f"methods.distill.{setting}: needed with `{switch}: {choice}`. Give a path.")

    def check_inputs(self, tokenizer: Any) -> None:
        if self.config.model:
            same_tokenizer(self.config.model, tokenizer, "methods.distill.model")
        if self.config.text:
            load_texts(self.config.text)

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        super().on_task_start(model, run)
        if self._rows == "text":
            self._texts = run.tokenise(load_texts(self.config.text))
            parts = self._texts["seq_lengths"] if "seq_lengths" in self._texts.column_names else None
            self._counts = np.array([len(ids) for ids in self._texts["input_ids"]])
            self._counts -= 1 if parts is None else np.array([len(lengths) for lengths in parts])

    def teacher(self, model: Any, run: Run) -> Teacher:
        c = self.config
        if c.teacher == "frozen":
            return Other.load(c.model, c.dtype, model, run.tokenizer, "methods.distill.model")
        if c.teacher == "ema":
            return Average(model, self._average if run.restored else run.start, c.decay)
        return Start(model, run.start)

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        if self._rows != "text":
            return super().batch_loss(batch, run)
        return self._on_texts(run) if len(run.step_batches) == 1 else None  # once per step

    def _on_texts(self, run: Run) -> torch.Tensor | None:
        """The mean over the tokens of this step's texts, times the tokens of the step, by which the trainer divides."""
        state, random = PartialState(), np.random.default_rng([run.seed, run.task_index, run.step, 2])
        drawn = random.permutation(len(self._texts))[: self.config.batch_size]
        mine = drawn[state.process_index :: state.num_processes]
        tokens = self._counts[drawn].sum()
        if not len(mine) or not tokens:
            return None
        ((inputs, _),) = run.batches(self._texts.select(mine), len(mine))
        predicts = _predicts(inputs)
        with passes.precision(predicts.device):
            student = params.hidden_states(run.model, inputs)[:, :-1][predicts]
        past, labels = self._teacher.hidden(inputs)[:, :-1][predicts], inputs["input_ids"][:, 1:][predicts]
        return self._weighed(student, past, labels, run) / float(tokens) * run.step_tokens

    def see_step(self, model: torch.nn.Module, run: Run) -> None:
        if isinstance(self._teacher, Average):
            self._teacher.update()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._teacher.average) if isinstance(self._teacher, Average) else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._average = state


def _predicts(inputs: dict[str, Any]) -> torch.Tensor:
    """Mask [B, T−1] of the positions whose next token is of the same text."""
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.shape == ids.shape:
        return mask[:, 1:].bool()
    if positions is not None and positions.shape == ids.shape:
        return positions[:, 1:] != 0  # flattened by padding-free batches: a text begins at 0
    return torch.ones_like(ids[:, 1:], dtype=torch.bool)
