"""Interpolate — moves the final weights part of the way back to where the task began.

    θ = θ_start + (1 − strength) (θ_final − θ_start)            (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903)

strength = 1 − α of the paper: 0 keeps the trained weights, 1 returns the start, both bit for bit.
Deviations from the paper: done on ΔW with LoRA, where the start is ΔW = 0, by scaling B alone (exact; scaling
    A and B would scale the product twice). One α for all layers.
Needs: nothing.
Cost: one copy of the trainable weights while training; nothing per step.
Combine with: anything else; runs last.   Conflicts: slao, shared_lora (whose adapters do not begin at zero),
    ogd (whose directions are those of the trained weights).
Tune: `strength` 0.3–0.5; forgetting grows about with the square of the distance from the start.
"""

from __future__ import annotations

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.merging import interpolate
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import params


class Interpolate(Method):
    """Weights between the start and the end of training."""

    family = "merging"
    paper = "arXiv:2109.01903"

    class Config(MethodConfig):
        strength: float = Field(0.5, ge=0, le=1)
        """How far to go back: 0 not at all, 1 to the start."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        learning = params.trainable(model)
        if any("lora_magnitude_vector" in name for name in learning):
            raise ConfigError(
                "methods.interpolate: with DoRA the weights are not linear in the adapter. "
                "Set `lora: {dora: false}`, or remove interpolate."
            )
        names = {id(p): name for name, p in learning.items()}
        for pair in params.lora_pairs(model).values():
            if bool((run.start[names[id(pair.B)]] != 0).any()):
                raise ConfigError(
                    "methods.interpolate: this adapter did not start at zero, so its product cannot be "
                    "interpolated at the same rank. Give each task a fresh adapter, or remove interpolate."
                )

    @torch.no_grad()
    def finish_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        share = 1 - self.config.strength
        for pair in params.lora_pairs(model).values():
            pair.B.mul_(share)
        outside = params.outside_lora(model)
        start = {name: params.local(params.aligned(run.start[name], p)) for name, p in outside.items()}
        interpolate(start, {name: params.local(p) for name, p in outside.items()}, share, in_place=True)
        return model
