"""SI — pulls each weight towards where it started, the harder the more it did for the tasks before.

    L = L_new + (strength / 2) Σ_i Ω_i (θ_i − θ*_i)²,    Ω_i += max(0, ω_i) / (Δ_i² + ξ),    ω_i = Σ_steps −g_i Δθ_i

(Synaptic Intelligence, Zenke, Poole, Ganguli 2017, arXiv:1703.04200, eq. 3 to 5.) θ* = weights at the start of the
task, ω = what a weight earned of the drop in loss during a task, recorded while it is learned: g = gradient of the
loss before clipping and before any method edits it, Δθ = the move of the step as all methods leave it, Δ = move over
the whole task, as the task leaves it. The
task's Ω begins to hold when the next task starts. With LoRA the pull is on the product ΔW = s·BA with the rank-1
importance r cᵀ / Σr, r from what the moves of B earned by row, c from what those of A earned by column. What the
tasks before left is multiplied by `decay` when a task is added; 1, the paper's form, adds up.
Deviations from the paper: before the first task every weight has the importance `prior` (the path that pretraining
    took is not known, so it counts as one task spread evenly); `prior: 0` is the paper's form, which only records
    during the first task; `importance` takes that of ewc or mas in its place. A task's Ω is scaled to mean 1, so
    `strength` means the same on every model; ξ is relative to the mean of Δ². The step includes the optimizer's
    weight decay.
Needs: nothing.
Cost: no pass over data, O(parameters) per step; five copies of the trainable weights (with LoRA of the factors).
Combine with: replay, distill, lora, freeze, ewc, interpolate. With `l2sp` set `prior: 0`, or the same pull acts twice.
Conflicts: none.
Tune: `strength` 0.01–10 in the gradient form; in the proximal form learning rate · strength · steps of 1–3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional import fisher, path_integral
from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.remembering import Remembering
from retain.models import importance, params
from retain.models.importance import Importance
from retain.models.pull import product_keys


class SI(Remembering, Method):
    """Synaptic Intelligence."""

    name = "si"
    family = "weights"
    paper = "arXiv:1703.04200, eq. 3 to 5"
    keeps_first = False
    finds_again = False
    _drops: params.Tensors  # ω by parameter name, and by row and column of adapted layers

    class Config(Remembering.Config):
        prior: float = Field(1.0, ge=0)
        """Importance of every weight before the first task; the mean of a task's is 1. 0 only records at first."""
        damping: float = Field(0.1, gt=0)
        """ξ, as a multiple of the mean squared move of all weights: bounds the importance of what hardly moved."""

    def check(self, tasks: Sequence[str] = ()) -> None:
        super().check(tasks)
        if self.config.importance is not None and "prior" in self.config.model_fields_set:
            raise ConfigError("methods.si.prior: has no effect with `importance`. Remove one of them.")

    def first(self, model: Any, run: Run) -> Importance:
        if not self.config.prior:
            run.say("si: nothing is held during the first task (prior: 0); it is only recorded.")
        return self.unknown(model, run)

    def unknown(self, model: Any, run: Run) -> Importance:
        return Importance(importance.even(model, self.config.prior), self.about(model, estimator="prior", rows=0))

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        super().on_task_start(model, run)
        drops = importance.even(model, 0.0)
        if run.restored:
            drops = {name: self._drops[name].to(zero.device) for name, zero in drops.items()}
        self._drops = drops
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # parameter → gradient and weights

    def see_gradients(self, model: torch.nn.Module, run: Run) -> None:
        learning = params.trainable(model).values()
        self._before = {id(p): (p.grad.clone(), p.detach().clone()) for p in learning if p.grad is not None}

    @torch.no_grad()
    def see_step(self, model: torch.nn.Module, run: Run) -> None:
        for name, p in params.outside_lora(model).items():
            if id(p) in self._before:
                self._drops[name] += path_integral.drop(*self._before[id(p)], p)
        for name, pair in params.lora_pairs(model).items():
            for key, p, within in zip(product_keys(name), (pair.B, pair.A), (1, 0)):
                if id(p) in self._before:
                    self._drops[key] += path_integral.drop(*self._before[id(p)], p).sum(within)
        self._before.clear()

    @torch.no_grad()
    def importance(self, model: torch.nn.Module, run: Run) -> params.Tensors:
        """Ω of this task by parameter name, mean 1 (0 where nothing was earned); `<layer>.rows` and `.columns` for
        adapted layers."""
        names = {id(p): name for name, p in params.trainable(model).items()}
        dense, pairs = params.outside_lora(model), params.lora_pairs(model)
        squares = {n: (p - params.aligned(run.start[n], p)).to(self._drops[n].dtype).square() for n, p in dense.items()}
        products = {}
        for name, pair in pairs.items():
            b0, a0 = (params.aligned(run.start[names[id(p)]], p) for p in (pair.B, pair.A))
            products[name] = path_integral.product_squares(pair.B, pair.A, b0, a0, pair.scaling)
        count = sum(p.numel() for p in dense.values()) + sum(len(r) * len(c) for r, c in products.values())
        whole = sum(float(s.double().sum()) for s in squares.values()) + sum(
            float(r.sum()) for r, _ in products.values()
        )
        if whole == 0:  # all was taken back: what is left has earned nothing
            return importance.even(model, 0.0)
        damping = self.config.damping * whole / count
        found = fisher.Importance(estimator="path")
        for name in dense:
            found.diagonal[name] = path_integral.importance(self._drops[name], squares[name], damping)
        for name, moved in products.items():
            by_row, by_column = (self._drops[key].double() for key in product_keys(name))
            rows, columns = path_integral.product_importance(by_row, by_column, *moved, damping)
            found.rows[name], found.columns[name] = rows.float(), columns.float()
        if found.total() > 0:
            fisher.normalise(found)
        sums = {key: s for n in pairs for key, s in zip(product_keys(n), (found.rows[n], found.columns[n]))}
        return found.diagonal | sums

    def learned(self, model: Any, run: Run) -> Importance:
        return Importance(self.importance(model, run), self.about(model, estimator="path", rows=0))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._drops)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._drops = dict(state)
