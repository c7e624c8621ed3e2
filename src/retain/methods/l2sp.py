"""L2-SP — pulls the weights towards where they started, all equally.

    L = L_new + (strength / 2) ‖θ − θ*‖²              (Li, Grandvalet, Davoine 2018, arXiv:1802.01483, eq. 2)

θ* = weights at the start of the task. With LoRA the pulled quantity is ‖ΔW‖_F², ΔW = s·BA.
Deviations from the paper: no second term for a new head, as a language model has none. The pull is added to
    the gradient after backward (or applied after the optimizer, `form: proximal`), never through autograd.
Cost: one copy of the trainable weights (none with LoRA beyond the factors); O(parameters) per step.
Combine with: replay, distill, lora, freeze, interpolate. Set `weight_decay: 0`, which pulls to zero instead.
Conflicts: ewc (which weighs the same pull by importance).
Tune: `strength` 0.01–1 in the gradient form, where Adam rescales it; in the proximal form the pull over a run
    is learning rate · strength · steps, and 1–3 is a strong hold.
"""

from __future__ import annotations

from typing import Literal

import torch

from retain.errors import ConfigError
from retain.methods.base import Method, Strength
from retain.methods.context import Run
from retain.models.pull import Pull


class L2SP(Method):
    """Distance to the starting weights."""

    family = "weights"
    paper = "arXiv:1802.01483, eq. 2"
    edits_gradients = True

    class Config(Strength):
        strength: float = 0.1
        """Weight of the pull; 0 is off."""
        form: Literal["gradient", "proximal"] = "gradient"
        """Add to the gradient before the optimizer, or move the weights after it."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        self.pull = Pull(model, run.start)
        if self.pull.protected == 0:
            raise ConfigError("methods.l2sp: no trainable weight to hold. Remove l2sp, or freeze less.")
        if self.config.form == "gradient":
            run.check_stiffness(self.name, self.pull.stiffness(self.config.strength, run.learning_rate))

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        value = self.pull.before_step(self.config.strength, self.config.form, run.logging_now)
        if value is not None:
            run.log(f"loss/{self.name}", value)

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        if self.config.form == "proximal":
            self.pull.step(self.config.strength, run.learning_rate)
