"""What methods that distil share: on which rows, from which teacher, and that it teaches something."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.tiled_head import Head, divergence
from retain.methods.base import Method, Strength
from retain.methods.context import Batch, Run, select
from retain.models import params
from retain.models.teachers import Start, Teacher


class Distilling(Method):
    """A divergence from a teacher on the supervised tokens of chosen rows.

    A subclass has the setting `rows`: all, new, replay, or auto, which is the replayed rows when there are any.
    """

    family = "functions"
    swaps_weights = True
    masks_label: ClassVar[bool] = False  # leaves the token that comes next out of both distributions

    class Config(Strength):
        strength: float = Field(0.5, ge=0)
        """Weight of the divergence against the cross-entropy; 0 is off."""
        temperature: float = Field(1.0, gt=0)
        """Softens both distributions; the gradient's size is kept by T²."""
        direction: Literal["forward", "reverse", "jsd"] = "forward"
        """KL(past‖now) keeps everything the past believed; reverse keeps its modes."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        self._differs, self._equal = False, set[int]()  # steps in which teacher and student were equal
        self._rows = self.config.rows
        if self._rows == "auto":
            self._rows = "replay" if run.has_replay else "all"
        if self._rows == "replay" and not run.has_replay:
            raise ConfigError(f"methods.{self.name}.rows: 'replay' without replayed rows. Add `replay`, or use 'all'.")
        self._teacher = self.teacher(model, run)

    def teacher(self, model: Any, run: Run) -> Teacher:
        """Who teaches in this task."""
        return Start(model, run.start)

    def compare(self, student: torch.Tensor, head: Head, past: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Divergence [N] of the student's hidden states [N, H] and head from the teacher's states [N, H′].

        `labels` [N] are the tokens that come next.
        """
        return divergence(
            student,
            head,
            past,
            self._teacher.head(),
            direction=self.config.direction,
            temperature=self.config.temperature,
            exclude=labels if self.masks_label else None,
        )

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        chosen = batch.of(self._rows, self.name)
        mask = batch.supervised & chosen[:, None]
        if not bool(mask.any()):
            return None
        past = self._teacher.hidden(select(batch.inputs, chosen))[:, :-1][mask[chosen]]
        return self._weighed(batch.hidden[:, :-1][mask], past, batch.labels[:, 1:][mask], run)

    def _weighed(self, student: torch.Tensor, past: torch.Tensor, labels: torch.Tensor, run: Run) -> torch.Tensor:
        head = Head(*params.head(run.model), *params.logit_rules(run.model))
        value = self.compare(student, head, past, labels).sum()
        self._check_teacher(float(value.detach()), run)
        return self.config.strength * value

    def _check_teacher(self, value: float, run: Run) -> None:
        """A teacher that always equals the student protects nothing, silently."""
        self._differs = self._differs or value != 0
        if self._differs or run.learning_rate <= 0:
            return
        self._equal.add(run.step)  # not batches: all of the first step come before anything has moved
        if len(self._equal) > 8:
            raise ConfigError(
                f"methods.{self.name}: after 8 steps the teacher still equals the student bit for bit; "
                "nothing is trained or nothing is protected. Check the learning rate and what is frozen."
            )
