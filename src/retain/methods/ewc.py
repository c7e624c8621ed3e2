"""EWC — pulls each weight towards where it started, the harder the more the old abilities depend on it.

    L = L_new + (strength / 2) Σ_i F_i (θ_i − θ*_i)²       (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3)

θ* = weights at the start of the task, F = diagonal Fisher information on rows that stand for old data, from the
first task on: a pretrained model has abilities to lose. With LoRA the pull is on the product ΔW = s·BA with the
rank-1 importance r cᵀ / Σr, r and c the row and column sums of the Fisher of the base weight (EWC-LoRA,
arXiv:2602.17559, in a form that never builds a matrix of the size of W).
Deviations from the paper: F is scaled to mean 1, so `strength` means the same on every model. Labels are drawn
    from the model with one backward per batch (unbiased) unless `estimator` says otherwise. Over several tasks
    F is summed and the anchor is the latest start (Huszár 2017, arXiv:1712.03847), not one penalty per task.
Cost: two copies of the trainable weights; one pass over `samples` rows per task; O(parameters) per step.
Combine with: replay, distill, lora, freeze, interpolate.   Conflicts: l2sp (EWC with F = 1).
Tune: `strength` 0.01–10 in the gradient form; in the proximal form learning rate · strength · steps of 1–3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from pydantic import Field
from safetensors.torch import load_file, save_file

from retain.errors import ConfigError
from retain.functional import fisher
from retain.functional.tiled_head import Head
from retain.methods.base import Method, Strength
from retain.methods.context import Run
from retain.models import params
from retain.models.base_gradients import base_gradients
from retain.models.pull import Pull, product_keys


class EWC(Method):
    """Elastic weight consolidation."""

    family = "weights"
    paper = "arXiv:1612.00796, eq. 3"
    conflicts = frozenset({"l2sp"})
    edits_gradients = True

    class Config(Strength):
        estimator: Literal["sampled", "rank1", "empirical", "exact"] = "sampled"
        """How the Fisher is estimated; with LoRA always sampled, in rank-1 form."""
        samples: int = Field(1000, ge=1)
        """Rows that the Fisher is estimated on, at most."""
        batch_size: int = Field(8, ge=1)
        """Rows per backward pass while estimating; the sampled estimate does not depend on it."""
        top_k: int | None = Field(None, ge=1)
        """Exact estimator only: labels enumerated per token, the rest as one."""
        form: Literal["gradient", "proximal"] = "gradient"
        """Add to the gradient before the optimizer, or move the weights after it."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        saved = run.shared_folder / "ewc" / f"{run.task_index:02d}.safetensors"
        known = saved.is_file() and (run.restored or run.task_index > 1)
        PartialState().wait_for_everyone()  # all have looked before one writes
        if known:
            importance = load_file(saved)
        else:
            importance = self.importance(model, run, run.old_rows(model, self.config.samples))
            _save(importance, saved)
        self._importance = importance
        self.pull = Pull(model, run.start, importance)
        if self.pull.protected == 0:
            raise ConfigError("methods.ewc: no trainable weight to protect. Remove ewc, or freeze less.")
        if self.config.form == "gradient":
            run.check_stiffness(self.name, self.pull.stiffness(self.config.strength, run.learning_rate))

    def importance(self, model: Any, run: Run, rows: Any) -> params.Tensors:
        """F by parameter name, mean 1; for adapted layers the row and column sums of the base weight's F."""
        rows = rows.select(range(min(len(rows), self.config.samples)))
        pairs = params.lora_pairs(model)
        dense = params.outside_lora(model)
        found: params.Tensors = {}
        if dense:
            estimate = self._accumulate(model, run, rows, dense, self.config.estimator)
            found |= {name: estimate.dense(name) for name in dense}
        if pairs:
            if self.config.estimator in ("empirical", "exact"):
                raise ConfigError(
                    f"methods.ewc.estimator: '{self.config.estimator}' has no effect with LoRA; use 'sampled'."
                )
            with base_gradients(model) as (bases, gradients):
                estimate = self._accumulate(model, run, rows, bases, "rank1", gradients)
            for name, pair in pairs.items():
                sums = (estimate.rows[name], estimate.columns[name])
                for key, value in zip(product_keys(name), sums[::-1] if pair.transposed else sums):
                    found[key] = value
        return found

    def _accumulate(
        self,
        model: Any,
        run: Run,
        rows: Any,
        weights: dict,
        estimator: fisher.Estimator,
        gradients: fisher.Gradients = fisher.plain_gradients,
    ) -> fisher.Importance:
        head = Head(*params.head(model), *params.logit_rules(model))

        def predict(batch: tuple[dict, torch.Tensor]) -> fisher.Prediction:
            inputs, labels = batch
            learned = labels[:, 1:] != -100
            hidden = params.hidden_states(model, inputs)[:, :-1][learned]
            sequence = torch.arange(len(labels), device=labels.device)[:, None].expand_as(learned)[learned]
            return fisher.Prediction(hidden=hidden, head=head, labels=labels[:, 1:][learned], sequence=sequence)

        generator = torch.Generator().manual_seed(run.seed + run.task_index)
        size = self.config.batch_size
        batches = run.track(run.batches(rows, size), f"importance of weights ({estimator})", -(-len(rows) // size))
        estimate = fisher.accumulate(
            weights,
            batches,
            predict,
            estimator,
            generator,
            self.config.top_k if estimator == "exact" else None,
            gradients,
        )
        return fisher.normalise(estimate)

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        value = self.pull.before_step(self.config.strength, self.config.form, run.logging_now)
        if value is not None:
            run.log(f"loss/{self.name}", value)

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        if self.config.form == "proximal":
            self.pull.step(self.config.strength, run.learning_rate)

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if run.shared is None or run.new_rows is None:
            return
        with params.evaluating(model):
            learned = self.importance(model, run, run.new_rows)
        total = {name: self._importance[name].to(t.device) + t for name, t in learned.items()}
        _save(total, run.shared_folder / "ewc" / f"{run.task_index + 1:02d}.safetensors")


def _save(importance: params.Tensors, path: Path) -> None:
    """Write an importance, whole or not at all; every process has the same one, the main process writes it."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        save_file({name: params.local(t).contiguous() for name, t in importance.items()}, partial)
        partial.replace(path)
