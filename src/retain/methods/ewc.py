"""EWC — pulls each weight towards where it started, the harder the more the old abilities depend on it.

    L = L_new + (strength / 2) Σ_i F_i (θ_i − θ*_i)²       (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3)

θ* = weights at the start of the task, F = diagonal Fisher information on rows that stand for old data, from the
first task on: a pretrained model has abilities to lose. Over several tasks this is online EWC (Schwarz et al. 2018,
arXiv:1805.06370): F ← decay · F + F of the task that ended, so that what is kept does not grow with their number.
A streamed task adds none (but with `estimator: adam`), as its rows are not read again.
With LoRA the pull is on the product ΔW = s·BA with the rank-1 importance r cᵀ / Σr, r and c the row and column sums
of the Fisher of the base weight (EWC-LoRA, arXiv:2602.17559, in a form that never builds a matrix of the size of W).
`estimator: adam` takes F from the second moment of Adam when a task ended, at no cost (Li et al. 2025,
arXiv:2507.18807). That is not the Fisher: it squares the gradient of a whole step, at true labels, so the sum over
tokens is inside the square and the squared mean is in it; it averages over the last 1/(1 − β₂) steps, not at θ; it
has seen clipping and the pulls of methods in the gradient form; a downloaded model has none.
Deviations from the paper: F is scaled to mean 1 over all weights (of adapted layers those of ΔW), so `strength` means
    the same on every model; `units: raw` is the paper's form. Labels are drawn from the model with one backward per
    batch (unbiased) unless `estimator` says otherwise. There is one anchor, the latest start, not one penalty per task,
    which counts old data twice (Huszár 2017, arXiv:1712.03847). The pull is decay · F + F_new itself; online EWC
    multiplies it by decay once more.
Needs: old rows once: the user's, or written by the model.
Cost: one forward and backward pass over `samples` rows per task, O(parameters) per step; two copies of the trainable
    weights. F lies in the run directory (`ewc/01.safetensors` from before the first task) and is found again by the
    content of model, rows and settings; `importance` takes it from there, or from mas or si.
Combine with: replay, distill, lora, freeze, interpolate.   Conflicts: l2sp (EWC with F = 1).
Tune: `strength` 0.01–10 in the gradient form; in the proximal form learning rate · strength · steps of 1–3. In raw
    units 1e4–5e4 up to 20 billion parameters, 5e3–1e4 up to 85, 1e3–5e3 beyond are a start; times the mean of F
    (in the header of its file) that is the strength in normalised units. `by_layer: true` holds the bottom harder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional import fisher
from retain.functional.tiled_head import Head
from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.remembering import Estimating
from retain.models import importance, moments, params
from retain.models.base_gradients import base_gradients
from retain.models.pull import product_keys
from retain.models.start_scores import sequences


class EWC(Estimating, Method):
    """Elastic weight consolidation."""

    name = "ewc"
    family = "weights"
    paper = "arXiv:1612.00796, eq. 3"
    conflicts = {"l2sp": "both pull to the same weights; l2sp is ewc with every importance at 1"}

    class Config(Estimating.Config):
        estimator: Literal["sampled", "rank1", "empirical", "exact", "adam"] = "sampled"
        """How the Fisher is estimated; with LoRA always sampled, in rank-1 form."""
        fallback: Literal["none", "sampled", "rank1", "empirical", "exact"] = "none"
        """For `adam`: the estimator before the first task, where there is no optimizer state yet."""
        batch_size: int = Field(8, ge=1)
        """Rows per backward pass while estimating; the sampled estimate does not depend on it."""
        top_k: int | None = Field(None, ge=1)
        """Exact estimator only: labels enumerated per token, the rest as one."""

    def check(self, tasks: Sequence[str] = ()) -> None:
        super().check(tasks)
        c = self.config
        if c.estimator == "adam" and c.fallback == "none" and c.importance is None:
            raise ConfigError(
                "methods.ewc.estimator: 'adam' takes F from the optimizer of a finished task; before the first task "
                "there is none. Set `fallback: sampled`, or give `importance:` an `optimizer.pt` or a run's directory."
            )
        if c.fallback != "none" and (c.estimator != "adam" or c.importance is not None):
            raise ConfigError("methods.ewc.fallback: has no effect without `estimator: adam`, or with `importance`.")
        if c.top_k is not None and "exact" not in (c.estimator, c.fallback):
            raise ConfigError("methods.ewc.top_k: has no effect without `estimator: exact`. Remove it.")

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        chosen, optimizer = self.config.estimator, run.optimizer.lower()
        if params.lora_pairs(model) and chosen in ("empirical", "exact", "adam"):
            raise ConfigError(f"methods.ewc.estimator: '{chosen}' has no effect with LoRA; use 'sampled'.")
        if chosen == "adam" and ("adam" not in optimizer or "bit" in optimizer):
            raise ConfigError(
                f"methods.ewc.estimator: 'adam' with `optim: {run.optimizer}`, which keeps no full second moment. Use "
                "`optim: adamw_torch`, or `estimator: sampled`."
            )
        super().on_task_start(model, run)

    def given(self, path: Path, model: Any) -> importance.Importance:
        if path.suffix not in (".pt", ".bin"):
            return super().given(path, model)
        found = moments.from_file(path, model, "methods.ewc.importance")
        self.scaled(dense=found)
        return importance.Importance(found.diagonal, self._described(model, 0))

    @property
    def reads_task(self) -> bool:
        return self.config.estimator != "adam"

    def learned(self, model: Any, run: Run) -> importance.Importance | None:
        if self.config.estimator != "adam":
            return super().learned(model, run)
        found = moments.second_moments(model, run.moments, run.adam_beta2, "methods.ewc.estimator")
        self.scaled(dense=found)
        return importance.Importance(found.diagonal, self._described(model, 0))

    def importance(self, model: Any, run: Run, rows: Any) -> params.Tensors:
        """F by parameter name, of mean 1 over all weights; for adapted layers the sums of the base weight's F."""
        rows = rows.select(range(min(len(rows), self.config.samples)))
        pairs = params.lora_pairs(model)
        dense = params.outside_lora(model)
        estimator = self.config.fallback if self.config.estimator == "adam" else self.config.estimator
        if estimator == "none":
            raise ConfigError(
                "methods.ewc.estimator: 'adam' knows nothing of weights that no earlier task trained, and some are "
                "trained now. Use `estimator: sampled`."
            )
        estimates: dict[str, fisher.Importance] = {}
        if dense:
            estimates["dense"] = self._accumulate(model, run, rows, dense, estimator)
        if pairs:
            with base_gradients(model) as (bases, gradients):
                estimates["adapted"] = self._accumulate(model, run, rows, bases, "rank1", gradients)
        self.scaled(**estimates)
        found = {name: estimates["dense"].dense(name) for name in dense}
        for name, pair in pairs.items():
            sums = (estimates["adapted"].rows[name], estimates["adapted"].columns[name])
            found |= dict(zip(product_keys(name), sums[::-1] if pair.transposed else sums))
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
            sequence = sequences(inputs, labels)[:, 1:][learned]
            return fisher.Prediction(hidden=hidden, head=head, labels=labels[:, 1:][learned], sequence=sequence)

        generator = torch.Generator().manual_seed(run.seed + run.task_index)
        size = self.config.batch_size
        batches = run.track(run.batches(rows, size), f"importance of weights ({estimator})", -(-len(rows) // size))
        top_k = self.config.top_k if estimator == "exact" else None
        return fisher.accumulate(weights, batches, predict, estimator, generator, top_k, gradients)
