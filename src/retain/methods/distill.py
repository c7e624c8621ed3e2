"""Distill — keeps the answers' distribution close to that of the model the task began with.

    L = L_new + strength · T² · KL(p⁰_T ‖ p_T)        (Li & Hoiem 2016, arXiv:1606.09282; Hinton 2015, arXiv:1503.02531)

p⁰ = the model at the start of the task, p = the model in training, T = temperature; per supervised token, and
summed and divided as the cross-entropy is. On replayed rows the term never opposes the new task.
Deviations from the paper: the teacher is not a second model: its forward pass runs with the starting weights in
    place of the trainable ones (with LoRA, without the adapters). The divergence is computed in tiles from hidden
    states, never as a batch × length × vocabulary tensor. No learning-rate warm-up of new heads.
Cost: one copy of the trainable weights; one more forward pass over the rows it applies to.
Combine with: replay (then it applies to the replayed rows), lora, ewc, freeze.   Conflicts: none.
Tune: `strength` 0.2–2, `temperature` 1–2. `rows: all` costs new-task score, as the term opposes what is learned.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.tiled_head import Head, divergence
from retain.methods.base import Method, Strength
from retain.methods.context import Batch, Run
from retain.models import params


class Distill(Method):
    """Learning without forgetting: the model's own past is the teacher."""

    family = "functions"
    paper = "arXiv:1606.09282"
    swaps_weights = True

    class Config(Strength):
        strength: float = 0.5
        """Weight of the divergence against the cross-entropy; 0 is off."""
        temperature: float = Field(1.0, gt=0)
        """Softens both distributions; the gradient's size is kept by T²."""
        direction: Literal["forward", "reverse", "jsd"] = "forward"
        """KL(past‖now) keeps everything the past believed; reverse keeps its modes."""
        rows: Literal["auto", "all", "new", "replay"] = "auto"
        """Where it applies; auto is the replayed rows when there are any, otherwise all."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        self._seen, self._same = 0, 0
        self._rows = self.config.rows
        if self._rows == "auto":
            self._rows = "replay" if run.has_replay else "all"
        if self._rows == "replay" and not run.has_replay:
            raise ConfigError("methods.distill.rows: 'replay' without replayed rows. Add `replay`, or use 'all'.")
        self._without_adapters = params.begins_at_base(model, run.start)
        # a host computes in half precision inside the student's `forward` alone; the teacher must compute alike
        kind = next(model.parameters()).device.type
        self._precision = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        chosen = {
            "all": torch.ones_like(batch.labels[:, 0], dtype=torch.bool),
            "new": batch.source == 0,
            "replay": batch.source > 0,
        }[self._rows]
        if len(chosen) != len(batch.labels):
            raise ConfigError(
                "methods.distill.rows: rows are flattened by padding-free packing, so new and replayed ones "
                "cannot be told apart. Set `rows: all` or `padding_free: false`."
            )
        mask = batch.supervised & chosen[:, None]
        if not bool(mask.any()):
            return None
        student = batch.hidden[:, :-1][mask]
        model = run.model
        with torch.no_grad(), torch.autocast(*self._precision), params.evaluating(model):
            inputs = _select(batch.inputs, chosen)
            if self._without_adapters:
                with params.adapters_off(model):
                    past = params.hidden_states(model, inputs)
            else:
                past = params.hidden_states(model, inputs, run.start)
            past = past[:, :-1][mask[chosen]]
        rules = params.logit_rules(model)
        value = divergence(
            student,
            Head(*params.head(model), *rules),
            past,
            Head(*params.head(model, run.start), *rules),
            direction=self.config.direction,
            temperature=self.config.temperature,
        ).sum()
        self._check_teacher(float(value.detach()), run)
        return self.config.strength * value

    def _check_teacher(self, value: float, run: Run) -> None:
        """A teacher that always equals the student protects nothing, silently."""
        if run.learning_rate > 0:
            self._seen += 1
            self._same += value == 0.0
        if self._seen == 8 and self._same == 8:
            raise ConfigError(
                "methods.distill: after 8 batches the teacher still equals the student bit for bit; "
                "nothing is trained or nothing is protected. Check the learning rate and what is frozen."
            )


def _select(inputs: dict, chosen: torch.Tensor) -> dict:
    if bool(chosen.all()):
        return inputs
    return {
        key: value[chosen] if torch.is_tensor(value) and value.shape[:1] == chosen.shape else value
        for key, value in inputs.items()
    }
