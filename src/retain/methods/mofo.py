"""MoFO — of every matrix only the entries with the largest momentum move in a step.

    θ_i ← θ_i + Δ_i  where |m_i| is among the largest share, else θ_i       (Chen et al. 2024, arXiv:2407.20999, alg. 1)

Δ = the step of the optimizer, m = its first moment, i runs over the entries of one matrix. Far fewer weights leave
their place, and those that stay hold what the model knew. Norms and biases move as usual.
Deviations from the paper: works over any optimizer with a first moment; what is not among the largest is put back
    bit for bit, weight decay included (the authors' code decays every weight at every step). Ties go by place.
Needs: nothing.
Cost: one selection per matrix and step; one copy of the trained matrices.
Combine with: replay, distill, ewc, interpolate.
Conflicts: ogd (after which every weight has moved).
Tune: `share` 0.05–0.2; smaller keeps more and learns more slowly. Little to gain with `lora`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.projection import dot, keep_top_share
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run
from retain.models import params


class MoFO(Method):
    """Momentum-filtered optimizer."""

    family = "gradients"
    paper = "arXiv:2407.20999"
    edits_gradients = True
    turn = Turn.SELECT
    restrains_steps = True
    off = {"share": 1.0}

    class Config(MethodConfig):
        share: float = Field(0.15, gt=0, le=1)
        """Share of each matrix that may move in a step; 1 is off."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._copies: dict[torch.nn.Parameter, torch.Tensor] = {}  # kept from step to step: new memory takes long
        self._moving: list[torch.nn.Parameter] = []

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        self._moving = [p for p in params.trainable(model).values() if p.dim() > 1 and p.grad is not None]
        for parameter in self._moving:
            if parameter not in self._copies:
                self._copies[parameter] = torch.empty_like(parameter)
            self._copies[parameter].copy_(parameter)

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        lost = []
        for parameter in self._moving:
            if parameter.grad is None:
                continue
            wished = parameter.clone() if run.logging_now else None
            keep_top_share(parameter, self._copies[parameter], _momentum(run, parameter), self.config.share)
            if wished is not None:
                lost.append(dot([parameter.grad], [parameter - wished]))
        if run.logging_now:  # what the filter costs the new task in this step, to first order, in nats
            run.log(f"loss/{self.name}", math.fsum(lost))

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        self._copies.clear()
        self._moving.clear()


def _momentum(run: Run, parameter: torch.nn.Parameter) -> torch.Tensor:
    state = run.moments(parameter)
    for name in ("exp_avg", "momentum_buffer"):
        if torch.is_tensor(state.get(name)):
            return state[name]
    optimizer = run.optimizer.rsplit(".", 1)[-1].lower()  # the host says OptimizerNames.SGD
    raise ConfigError(f"methods.mofo: the optimizer '{optimizer}' keeps no first moment. Set `optim: adamw_torch`.")
