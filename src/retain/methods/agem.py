"""A-GEM — steps that would make old rows worse are turned until they do not.

    g̃ = g − strength · (⟨g, r⟩ / ‖r‖²) r  where ⟨g, r⟩ < 0, else g    (Chaudhry et al. 2018, arXiv:1812.00420, eq. 11)

g = gradient of the step, r = gradient of the loss on `batch_size` old rows, drawn anew at every step. Old rows
are those the user gives as `old` (otherwise rows the model writes itself) and, in a sequence, rows of earlier tasks
(of a streamed task none is kept).
Deviations from the paper: the model's abilities from before are a memory too, so it acts from the first task on.
    Dots are taken over the global gradient, once per optimizer step. Adam then rescales the step, so that the
    promise holds to first order for plain gradient descent only. `strength` below 1 takes out a part.
Needs: old rows at every step: the user's, or written by the model.
Cost: one more forward and backward pass, on `batch_size` rows, per step; one gradient in memory.
Combine with: lora, freeze, replay, distill; list it after what adds to the gradient, so that its pull is judged too.
Conflicts: none.
Tune: `batch_size` at least the rows of a step; where few steps are turned (`agem/turned`), it costs and does nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field

from retain.data.buffer import Buffer
from retain.data.replay_sources import joined, shared_folder
from retain.errors import ConfigError
from retain.functional.projection import without_conflict
from retain.methods.base import Method, Strength, Turn
from retain.methods.context import Run, answer_loss
from retain.models import params, passes


class AGEM(Method):
    """Averaged gradient episodic memory."""

    family = "gradients"
    paper = "arXiv:1812.00420, eq. 11"
    edits_gradients = True
    turn = Turn.BEND

    class Config(Strength):
        strength: float = Field(1.0, ge=0, le=1)
        """Share of the conflict that is taken out; 1 is the paper's, 0 is off."""
        batch_size: int = Field(8, ge=1)
        """Old rows that the reference gradient of a step is taken on, over all processes."""
        rows: int = Field(256, ge=1)
        """Old rows to draw from, at most; as many again of earlier tasks."""
        buffer: int = Field(10_000, ge=0)
        """Rows of earlier tasks kept on disk, in one place with a `replay` that keeps as many; 0 keeps none."""

    def keeps_text(self, old: bool) -> str | None:
        return "keeps rows of tasks; set `buffer: 0`" if self.config.buffer else None

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        if self.config.buffer:
            run.say_unread(self.name, "none is kept for later tasks")
        parts = [run.old_rows(model, self.config.rows)]
        folder = shared_folder(run.buffer, self.config.buffer)
        if self.config.buffer and folder.is_dir():
            # a run killed after this task filled the buffer must draw what it drew before
            buffer = Buffer(folder, size=self.config.buffer, seed=run.seed).before(run.task)
            if len(buffer):
                rows = buffer.rows()
                number = min(self.config.rows, len(rows))
                parts.append(rows.shuffle(seed=run.seed + run.task_index).select(range(number)))
        found = joined([run.tokenise(part) for part in parts if len(part)])
        if found is None or len(found) == 0:
            raise ConfigError("methods.agem: no old row is left after tokenising. Give `old:` rows, or other ones.")
        self._rows = found

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        learning = [p for p in params.trainable(model).values() if p.grad is not None]
        with params.evaluating(model):
            reference, loss, tokens = passes.gradients(model, learning, self.batches(run), answer_loss, run.reduce)
        if tokens:
            torch._foreach_div_(reference, tokens)
        cosine = without_conflict([p.grad for p in learning if p.grad is not None], reference, self.config.strength)
        run.log(f"loss/{self.name}", loss / max(tokens, 1))
        run.log(f"{self.name}/turned", float(cosine < 0))

    def batches(self, run: Run) -> Any:
        """This process's part of the old rows of a step."""
        ranks = PartialState()
        drawn = np.random.default_rng([run.seed, run.task_index, run.step]).permutation(len(self._rows))
        mine = drawn[: self.config.batch_size][ranks.process_index :: ranks.num_processes]
        return run.batches(self._rows.select(mine), len(mine)) if len(mine) else iter(())

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if not self.config.buffer or run.new_rows is None or not PartialState().is_main_process:
            return
        buffer = Buffer(shared_folder(run.buffer, self.config.buffer), size=self.config.buffer, seed=run.seed)
        if run.task not in buffer.counts("source"):
            buffer.add(run.new_rows, run.task)
