"""What methods that pull weights to where they started share: strength over task, layers and names, and two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from retain.errors import ConfigError
from retain.functional import strengths
from retain.methods.base import Method, Strength
from retain.methods.context import Run
from retain.models import layer_strengths, params
from retain.models.pull import Pull

#: Learning rate · strength · steps at which `strength: auto` begins in the proximal form: a strong hold begins there.
HOLD = 1.0


class Pulling(Method):
    """A method whose pull is ½ · strength · Σ F (θ − θ*)²; a subclass calls `hold` when the task starts."""

    edits_gradients = True
    boosts = True

    class Config(Strength):
        strength: float = Field(1.0, ge=0)
        """Weight of the pull; 0 is off. The start of a schedule that is not constant."""
        form: Literal["gradient", "proximal"] = "gradient"
        """Add to the gradient before the optimizer, or move the weights after it."""
        schedule: Literal["constant", "linear", "cosine", "rising", "custom"] = "constant"
        """How the strength moves over the task."""
        end: float | None = Field(None, ge=0)
        """Strength at the end of a linear, cosine or rising schedule; by default 1/5, 1/3 and 2 times the start."""
        expression: str | None = None
        """For `custom`: a factor on the strength as an expression of t in [0, 1], e.g. `1 - t`."""
        by_layer: bool | list[float] = False
        """Factors on the strength at the bottom and at the top, linear between; true is [2.0, 0.5]."""
        patterns: dict[str, float] = {}
        """Factor on the strength by regular expression on parameter names; all that match are multiplied."""

        @field_validator("by_layer")
        @classmethod
        def _two(cls, given: bool | list[float]) -> bool | list[float]:
            if isinstance(given, list) and (len(given) != 2 or not all(0 <= x < float("inf") for x in given)):
                raise ValueError("two factors ≥ 0, at the bottom and at the top")
            return given

    @property
    def active(self) -> bool:
        return super().active or bool(self.config.end)  # a pull that rises from 0

    def check(self, tasks: Sequence[str] = ()) -> None:
        self._over_task()

    def _over_task(self) -> Any:
        c = self.config
        try:
            return strengths.over_task(c.schedule, c.strength, c.end, c.expression)
        except ConfigError as error:
            raise ConfigError(f"methods.{self.name}.{error}") from None

    def hold(self, model: torch.nn.Module, run: Run, importance: params.Tensors | None = None) -> None:
        """Anchor the weights where they are, F = 1 without an importance, and check that the pull can be followed."""
        c, where = self.config, f"methods.{self.name}"
        self._strength, self._rate = self._over_task(), run.learning_rate
        ends = (2.0, 0.5) if c.by_layer is True else tuple(c.by_layer) if c.by_layer else None
        factors = layer_strengths.factors(model, ends, c.patterns, where) if ends or c.patterns else None
        self.pull = Pull(model, run.start, importance, factors)
        if self.pull.protected == 0:
            raise ConfigError(
                f"{where}: no trainable weight to hold. Remove {self.name}, freeze less, or see `patterns`."
            )
        if c.form == "gradient":
            most = max(self._strength(i / 1000) for i in range(1001))
            run.check_stiffness(self.name, self.pull.stiffness(most, run.learning_rate))

    def strength(self, run: Run) -> float:
        """The strength in this step."""
        value = self._strength(min(1.0, run.step / run.max_steps) if run.max_steps > 0 else 0.0)
        return self.boost * self._begins(run) * value

    def _begins(self, run: Run) -> float:
        """The factor that `strength: auto` begins with. What a strength does in the proximal form depends on rate and
        steps, over many orders of magnitude; in the gradient form Adam rescales it."""
        way = self._rate * run.max_steps * self.config.strength
        return HOLD / way if self.auto and self.config.form == "proximal" and way > 0 else 1.0

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        value = self.pull.before_step(self.strength(run), self.config.form, run.logging_now)
        if value is not None:
            run.log(f"loss/{self.name}", value)
            if self.auto or self.config.schedule != "constant" or self.boost != 1:
                run.log(f"{self.name}/strength", self.strength(run))

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        if self.config.form == "proximal":
            self.pull.step(self.strength(run), run.learning_rate)
