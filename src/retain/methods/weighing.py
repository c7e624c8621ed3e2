"""What methods that weigh tokens share: strength, a mean weight of 1, and what is logged."""

from __future__ import annotations

import torch
from pydantic import Field

from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run, Tokens


class Weighing(Method):
    """A method that weighs the tokens of the main loss; a subclass says how in `weigh`.

    The weight of a token is 1 + strength · (w − 1). With `normalise` it is divided by the mean of the steps before
    (over all ranks, decaying with `MEMORY`), so that the size of a step stays what the learning rate says and a gain
    does not come from smaller steps alone; the mean of the very first step is not known and taken as 1. All
    micro-batches of a step are divided by the same number, so the split into micro-batches changes nothing.
    """

    family = "tokens"
    MEMORY = 0.9  # of the running mean, per step

    class Config(MethodConfig):
        strength: float = Field(1.0, ge=0, le=1)
        """0 is off, 1 the method's own weights, between them a mixture."""
        normalise: bool = True
        """Keep the mean weight at 1; false is the form of the paper, which also takes smaller steps."""

    def weigh(self, tokens: Tokens, run: Run) -> torch.Tensor:
        """The method's own weights [N] ≥ 0."""
        raise NotImplementedError

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        if not run.restored:
            self._total = torch.zeros(2, dtype=torch.float64)  # decayed sums of weights, and of tokens
        self._step: list[torch.Tensor] = []

    def token_weights(self, tokens: Tokens, run: Run) -> torch.Tensor | None:
        weights = 1 + self.config.strength * (self.weigh(tokens, run) - 1)
        self._step.append(torch.stack([weights.double().sum(), weights.new_tensor(len(weights), dtype=torch.float64)]))
        known = float(self._total[1]) > 0 and float(self._total[0]) > 0
        return weights / float(self._total[0] / self._total[1]) if self.config.normalise and known else weights

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        if not self._step:
            return
        seen = run.reduce(torch.stack(self._step).sum(0)).cpu()
        self._step.clear()
        self._total = self.MEMORY * self._total + seen
        run.log(f"{self.name}/weight", float(seen[0] / seen[1].clamp(min=1)))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"total": self._total}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._total = state["total"]
