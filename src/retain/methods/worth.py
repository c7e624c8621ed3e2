"""What a replay row is worth, by each kind of priority: measured from the model as it is, or read off its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from retain.data.own_function import numbers
from retain.errors import TrainingDiverged
from retain.functional.priorities import term_priorities
from retain.methods.context import Run
from retain.models import params
from retain.models.row_scores import row_gradient_norms, row_losses

#: Kinds that change while training, and those among them that know the loss a row was stored with.
MEASURED = ("loss", "forgetting", "gradient", "custom")
COMPARED = ("forgetting", "custom")
#: Rows of a forward pass, and most rows that are measured without a progress bar.
SIZE, QUIET = 8, 64


@dataclass(frozen=True)
class Worth:
    """A kind of priority.

    Args:
        kind: `forgetting`, `loss`, `gradient`, `length`, `terms` or `custom`.
        terms: for `terms`.
        function: for `custom`.
        where: setting that a mistake in `function` is reported under.
    """

    kind: str
    terms: tuple[str, ...] = ()
    function: str | None = None
    where: str = "methods.replay.function"

    def of(self, rows: Any, run: Run, reference: np.ndarray, losses: np.ndarray | None = None) -> np.ndarray:
        """Priority of tokenised rows, the same on every rank.

        Args:
            rows: a `datasets.Dataset` with `input_ids` and `labels`.
            reference: [rows] losses when they were stored; read by the kinds of `COMPARED`.
            losses: [rows] losses now, where they are known already.

        Returns:
            float64 [rows]: nats per token for `forgetting` (negative where a row got better) and `loss`; the norm for
            `gradient`; supervised tokens for `length`; in [0, 1] for `terms`.

        Raises:
            TrainingDiverged: a loss or a norm is no number.
            ConfigError: the user's function fails.
        """
        if self.kind == "length":
            return np.array([sum(label != -100 for label in labels) for labels in rows["labels"]], np.float64)
        if self.kind == "terms":
            return term_priorities([run.tokenizer.decode(ids) for ids in rows["input_ids"]], self.terms)
        if self.kind == "gradient":
            return measured(rows, run, row_gradient_norms, size=1)
        losses = self.losses(rows, run) if losses is None else losses
        if self.kind == "custom":
            return numbers(self.function, self.where, _described(rows, losses, reference, run))
        return losses - reference if self.kind == "forgetting" else losses

    @staticmethod
    def losses(rows: Any, run: Run) -> np.ndarray:
        """Loss of tokenised rows now, in nats per supervised token."""
        return measured(rows, run, row_losses)


def measured(rows: Any, run: Run, measure: Any, size: int = SIZE) -> np.ndarray:
    """`measure(model, batches)` of rows, in evaluation mode; the ranks share the work, equally many rows each.

    Raises:
        TrainingDiverged: what was measured is no number.
    """
    state, number = PartialState(), len(rows)
    padded = np.resize(np.arange(number), -(-number // state.num_processes) * state.num_processes)
    mine = padded[state.process_index :: state.num_processes]
    batches: Any = run.batches(rows.select(mine), size)
    if number > QUIET:
        batches = run.track(batches, "old rows are looked at", -(-len(mine) // size))
    with params.evaluating(run.model):
        found = torch.from_numpy(measure(run.model, batches))
    device = next(run.model.parameters()).device
    whole = torch.zeros(len(padded), dtype=torch.float32 if device.type == "mps" else torch.float64)
    whole[state.process_index :: state.num_processes] = found.to(whole.dtype)
    whole = run.reduce(whole.to(device)).cpu().double()[:number]
    if not torch.isfinite(whole).all():
        raise TrainingDiverged(
            f"training step {run.step + 1}: the loss of a replay row is no number. Lower the learning rate, then run "
            "again."
        )
    return whole.numpy()


def _described(rows: Any, losses: np.ndarray, reference: np.ndarray, run: Run) -> list[dict[str, Any]]:
    """Rows as a user's function sees them."""
    return [
        {
            "text": run.tokenizer.decode(row["input_ids"]),
            "answer": run.tokenizer.decode([label for label in row["labels"] if label != -100]),
            "loss": float(loss),
            "reference": float(before),
        }
        for row, loss, before in zip(rows, losses, reference)
    ]
