"""L2-SP — pulls the weights towards where they started, all equally.

    L = L_new + (strength / 2) ‖θ − θ*‖²              (Li, Grandvalet, Davoine 2018, arXiv:1802.01483, eq. 2)

θ* = weights at the start of the task. With LoRA the pulled quantity is ‖ΔW‖_F², ΔW = s·BA.
Deviations from the paper: no second term for a new head, as a language model has none. The pull is added to
    the gradient after backward (or applied after the optimizer, `form: proximal`), never through autograd.
Needs: nothing.
Cost: O(parameters) per step; one copy of the trainable weights (none with LoRA beyond the factors).
Combine with: replay, distill, lora, freeze, interpolate. Set `weight_decay: 0`, which pulls to zero instead.
Conflicts: ewc (which weighs the same pull by importance).
Tune: `strength` 0.01–1 in the gradient form, where Adam rescales it; in the proximal form the pull over a run
    is learning rate · strength · steps, and 1–3 is a strong hold. `by_layer: true` holds the bottom harder.
"""

from __future__ import annotations

import torch
from pydantic import Field

from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.pulling import Pulling


class L2SP(Pulling, Method):
    """Distance to the starting weights."""

    name = "l2sp"
    family = "weights"
    paper = "arXiv:1802.01483, eq. 2"

    class Config(Pulling.Config):
        strength: float = Field(0.1, ge=0)
        """Weight of the pull; 0 is off. The start of a schedule that is not constant."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        self.hold(model, run)
