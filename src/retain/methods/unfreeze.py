"""Unfreeze — opens the model from the top down while it learns, the lower parts later and at lower rates.

    η_g = η · decay^(−g), and group g moves from step g · every · steps on     (Howard & Ruder 2018, arXiv:1801.06146)

g counts groups of layers from the top, 0 holds the head and the last norm too, the last one the embeddings; η = the
trainer's learning rate. `stages` says instead which layers from the top are open when, and at which rate.
A closed weight stays bit for bit: its gradient is taken away before the optimizer sees it, so that neither
moments nor weight decay move it. What can be trained at all is not changed, so a run may be continued, or split
over processes, at any step.
Deviations from the paper: the rate falls from group to group, not from layer to layer (2.6 per layer would stop
    half of a deep model). A group opens after a share of the steps, not after an epoch, and warms up, as its moments
    are empty. A head tied to the embeddings opens with them. The learning-rate schedule is the trainer's.
Needs: nothing.
Cost: none saved, as gradients of closed weights are computed; a copy of those that move at a reduced rate.
Combine with: anything. What other methods move after the optimizer is slowed down as well.
    With `lora` the adapters are what opens.   Conflicts: ogd (which would move what is closed).
Tune: `groups` 4–6; `stages: [{top: 2}, {begin: 0.5, learning_rate: 5.0e-6}]` is the head and two layers first, then
    everything at 5e-6; `rate: 0.1` says it as a factor.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run
from retain.models import params


class Stage(MethodConfig):
    """What is open from some point on."""

    begin: float = Field(0.0, ge=0, lt=1)
    """Share of the task's steps after which the stage begins."""
    top: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Open layers, counted from the top, with the head and the last norm (0: those alone); `all` for everything."""
    rate: float = Field(1.0, gt=0)
    """Factor on the learning rate while the stage lasts."""
    learning_rate: float | None = Field(None, gt=0)
    """The learning rate of the stage itself, in place of a factor on the trainer's; the schedule goes on acting."""

    @model_validator(mode="after")
    def _one_rate(self) -> Stage:
        if self.learning_rate is not None and "rate" in self.model_fields_set:
            raise ValueError("`rate` is a factor on the learning rate and `learning_rate` the rate itself; set one")
        return self


class Unfreeze(Method):
    """Gradual unfreezing with discriminative rates, and training in stages."""

    family = "isolation"
    paper = "arXiv:1801.06146"
    edits_gradients = True
    turn = Turn.CLOSE
    restrains_steps = True
    off = {"groups": 1, "decay": 1.0, "stages": []}

    class Config(MethodConfig):
        groups: int = Field(4, ge=1)
        """Groups of layers, opened one after the other from the top; no more than there are layers."""
        every: float = Field(0.1, ge=0, lt=1)
        """Share of the task's steps between two openings; 0 opens all at once, at their own rates."""
        decay: float = Field(2.6, ge=1)
        """How many times slower a group learns than the one above it."""
        stages: list[Stage] = []
        """Stages by hand (`begin`, `top`, `rate`), in place of groups."""
        warmup: int = Field(10, ge=0)
        """Steps over which the rate of what opens after the first step rises to its value."""

        @field_validator("stages")
        @classmethod
        def _in_order(cls, stages: list[Stage]) -> list[Stage]:
            begins = [stage.begin for stage in stages]
            if stages and (begins[0] != 0 or any(a >= b for a, b in itertools.pairwise(begins))):
                raise ValueError("the first stage begins at 0 and each later one after the one before")
            return stages

    def stages(self, model: torch.nn.Module, peak: float = 0.0) -> list[tuple[float, dict[str, float]]]:
        """(share of the steps at which it begins, factor on the learning rate of each open parameter) per stage.

        Args:
            peak: the trainer's learning rate, which a stage with one of its own is measured by.

        Raises:
            ConfigError: the first stage opens nothing that is trainable.
        """
        depth = _depths(model)
        c = self.config
        if c.stages:
            found = [
                (s.begin, {name: _rate(s, peak) for name, d in depth.items() if s.top == "all" or d < s.top})
                for s in c.stages
            ]
        else:
            layers = sorted({d for d in depth.values() if 0 <= d < math.inf})
            count = max(1, min(c.groups, len(layers)))
            group_of = {-1.0: 0, math.inf: count - 1} | {d: i * count // len(layers) for i, d in enumerate(layers)}
            rates = {name: c.decay ** -group_of[d] for name, d in depth.items()}
            found = [
                (last * c.every, {name: rates[name] for name, d in depth.items() if group_of[d] <= last})
                for last in range(count)
            ]
            found = found if c.every else found[-1:]
        if not found[0][1]:
            raise ConfigError("methods.unfreeze: the first stage opens nothing trainable. Raise `top`, or freeze less.")
        return found

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        self._stages = self.stages(model, run.learning_rate if run else 0.0)
        self._full = {n: max(rates.get(n, 0.0) for _, rates in self._stages) for n in params.trainable(model)}
        self._begins: list[int] = []
        self._before: params.Tensors = {}

    def learning_rates(self, model: torch.nn.Module, run: Run) -> dict[str, float]:
        return {name: rate for name, rate in self._full.items() if rate not in (0.0, 1.0)}

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        if not self._begins:
            self._plan(model, run)
        now = max(i for i, begin in enumerate(self._begins) if begin <= run.step)
        rates = self._stages[now][1]
        self._before.clear()
        self._share = {name: self._rise(name, run) * rate / self._full[name] for name, rate in rates.items()}
        for name, p in params.trainable(model).items():
            if name not in rates:
                p.grad = None
            elif p.grad is not None and self._share[name] != 1:
                self._before[name] = p.detach().clone()
        if run.logging_now:
            run.log(f"loss/{self.name}", 0.0)  # it adds no term
            run.log(f"{self.name}/stage", now + 1)

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        # steps are proportional to the learning rate: a share of the step is the step at that share of the rate
        learning = params.trainable(model)
        for name, before in self._before.items():
            wide = torch.promote_types(before.dtype, torch.float32)
            learning[name].copy_(torch.lerp(before.to(wide), learning[name].to(wide), self._share[name]))
        self._before.clear()

    def _rise(self, name: str, run: Run) -> float:
        opened = next(begin for begin, (_, rates) in zip(self._begins, self._stages) if name in rates)
        return min(1.0, (run.step - opened + 1) / (self.config.warmup + 1)) if opened else 1.0

    def _plan(self, model: torch.nn.Module, run: Run) -> None:
        """Turn shares into steps, now that their number is known, and say what each stage trains."""
        # 0.1 · 30 is a little more than 3
        self._begins = [math.ceil(round(begin * run.max_steps, 6)) for begin, _ in self._stages]
        sizes = {name: p.numel() for name, p in params.trainable(model).items()}
        for i, (begin, (_, rates)) in enumerate(zip(self._begins, self._stages)):
            if begin >= run.max_steps:
                raise ConfigError(
                    f"methods.unfreeze: stage {i + 1} would begin at step {begin} of {run.max_steps}, so never. "
                    "Let it begin earlier, or train longer."
                )
            ends = [*self._begins, run.max_steps][i + 1]
            low, high = min(rates.values()), max(rates.values())
            own = self.config.stages[i].learning_rate if self.config.stages else None
            run.say(
                f"unfreeze: steps {begin + 1}–{ends}: {sum(sizes[n] for n in rates):,} of {sum(sizes.values()):,} "
                f"trainable parameters, learning rate × {f'{low:.3g}' if low == high else f'{low:.3g} to {high:.3g}'}"
                + (f" ({own:.3g})." if own else ".")
                if ends > begin
                else f"unfreeze: stage {i + 1} has no step of its own; the run is too short for it."
            )


def _rate(stage: Stage, peak: float) -> float:
    if stage.learning_rate is None:
        return stage.rate
    if not peak:
        raise ConfigError("methods.unfreeze.stages.learning_rate: the trainer's is 0. Set `train: {learning_rate: …}`.")
    return stage.learning_rate / peak


def _depths(model: torch.nn.Module) -> dict[str, float]:
    """How deep each trainable parameter lies: its layer from the top, −1 for head and last norm, ∞ for embeddings."""
    layers = params.decoder_layers(model)
    depth = {id(p): math.inf for m in params.input_modules(model) for p in m.parameters()}
    depth |= {id(p): float(i) for i, layer in enumerate(reversed(layers)) for p in layer.parameters()}
    return {name: depth.get(id(p), -1.0) for name, p in params.trainable(model).items()}
