"""What methods that distil share: on which rows, from which teacher, and that it teaches something."""

from __future__ import annotations

from typing import Any

import torch

from retain.errors import ConfigError
from retain.functional.tiled_head import Head
from retain.methods.base import Method, Strength
from retain.methods.context import Batch, Run, select
from retain.models import params
from retain.models.teachers import Start, Teacher


class Distilling(Method):
    """A divergence from a teacher on the supervised tokens of chosen rows; a subclass says which in `compare`.

    A subclass has the setting `rows`: all, new, replay, or auto, which is the replayed rows when there are any.
    """

    family = "functions"
    swaps_weights = True

    class Config(Strength):
        pass

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
        raise NotImplementedError

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
