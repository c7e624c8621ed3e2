"""SI — pulls each weight towards where it started, the harder the more it did for the tasks before.

    L = L_new + (strength / 2) Σ_i Ω_i (θ_i − θ*_i)²,    Ω_i += max(0, ω_i) / (Δ_i² + ξ),    ω_i = Σ_steps −g_i Δθ_i

(Synaptic Intelligence, Zenke, Poole, Ganguli 2017, arXiv:1703.04200, eq. 3 to 5.) θ* = weights at the start of the
task, ω = what a weight earned of the drop in loss during a task, recorded while it is learned: g = gradient of the
loss before clipping and without the pull, Δθ = what the optimizer really moved, Δ = move over the whole task. The
task's Ω begins to hold when the next task starts. With LoRA the pull is on the product ΔW = s·BA with the rank-1
importance r cᵀ / Σr, r from what the moves of B earned by row, c from what those of A earned by column.
Deviations from the paper: before the first task every weight has the importance `prior` (the path that pretraining
    took is not known, so it counts as one task spread evenly); `prior: 0` is the paper's form, which only records
    during the first task. A task's Ω is scaled to mean 1, so `strength` means the same on every model; ξ is relative
    to the mean of Δ². The step includes the optimizer's weight decay.
Cost: five copies of the trainable weights (with LoRA of the factors); no pass over data; O(parameters) per step.
Combine with: replay, distill, lora, freeze, ewc, interpolate. List it before other methods that edit gradients, whose
    part would be recorded with the task's. With `l2sp` set `prior: 0`, or the same pull acts twice.   Conflicts: none.
Tune: `strength` 0.01–10 in the gradient form; in the proximal form learning rate · strength · steps of 1–3.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional import fisher, path_integral
from retain.methods.base import Method, Strength
from retain.methods.context import Run
from retain.models import importance, params
from retain.models.pull import Pull, product_keys


class SI(Method):
    """Synaptic Intelligence."""

    family = "weights"
    paper = "arXiv:1703.04200, eq. 3 to 5"
    edits_gradients = True
    _drops: params.Tensors  # ω by parameter name, and by row and column of adapted layers

    class Config(Strength):
        strength: float = Field(1.0, ge=0)
        """Weight of the pull; 0 is off."""
        prior: float = Field(1.0, ge=0)
        """Importance of every weight before the first task; the mean of a task's is 1. 0 only records at first."""
        damping: float = Field(0.1, gt=0)
        """ξ, as a multiple of the mean squared move of all weights: bounds the importance of what hardly moved."""
        form: Literal["gradient", "proximal"] = "gradient"
        """Add to the gradient before the optimizer, or move the weights after it."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        saved = importance.load(run.shared_folder / "si" / f"{run.task_index:02d}.safetensors", run.task_index > 1)
        self._importance = importance.even(model, self.config.prior) if saved is None else saved
        if saved is None and not self.config.prior:
            run.say("si: nothing is held during the first task (prior: 0); it is only recorded.")
        drops = importance.even(model, 0.0)
        if run.restored:
            drops = {name: self._drops[name].to(zero.device) for name, zero in drops.items()}
        self._drops = drops
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # parameter → gradient and weights
        self.pull = Pull(model, run.start, self._importance)
        if self.pull.protected == 0:
            raise ConfigError("methods.si: no trainable weight to protect. Remove si, or freeze less.")
        if self.config.form == "gradient":
            run.check_stiffness(self.name, self.pull.stiffness(self.config.strength, run.learning_rate))

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        learning = params.trainable(model).values()
        self._before = {id(p): (p.grad.clone(), p.detach().clone()) for p in learning if p.grad is not None}
        value = self.pull.before_step(self.config.strength, self.config.form, run.logging_now)
        if value is not None:
            run.log(f"loss/{self.name}", value)

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        for name, p in params.outside_lora(model).items():
            if id(p) in self._before:
                self._drops[name] += path_integral.drop(*self._before[id(p)], p)
        for name, pair in params.lora_pairs(model).items():
            for key, p, within in zip(product_keys(name), (pair.B, pair.A), (1, 0)):
                if id(p) in self._before:
                    self._drops[key] += path_integral.drop(*self._before[id(p)], p).sum(within)
        self._before.clear()
        if self.config.form == "proximal":
            self.pull.step(self.config.strength, run.learning_rate)

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

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if run.shared is None:
            return
        total = importance.added(self._importance, self.importance(model, run))
        importance.save(total, run.shared_folder / "si" / f"{run.task_index + 1:02d}.safetensors")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._drops)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._drops = dict(state)
