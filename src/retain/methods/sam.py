"""SAM — learns with the gradient from the worst point nearby, which leads to flat minima that are forgotten less.

    g ← g + ∇L(θ + ε) − ∇L(θ),   ε = radius · ∇L(θ) / ‖∇L(θ)‖         (Foret et al. 2020, arXiv:2010.01412, eq. 2–3)

L = cross-entropy of the rows of a step, g = gradient of everything that is learned from in that step; with L alone,
g becomes ∇L(θ + ε). Against forgetting in language models: Li et al. 2024, arXiv:2406.04836.
Deviations from the paper: terms of other methods are kept as they are at θ; where there are any, ∇L(θ) is taken in a
    pass of its own. ε is taken from the whole step over all ranks and micro-batches, and all passes draw the same
    dropout masks.
Needs: nothing.
Cost: one more forward and backward pass per step, with a copy and a gradient of the trainable weights; two more and
    another gradient where a method adds a term or weighs tokens, or one before it in the list edits gradients.
Combine with: replay, lora, distill, interpolate; list it before what edits gradients.   Conflicts: none.
Tune: `radius` 0.01–0.05 for full fine-tuning, larger with `lora`. In pure bfloat16 weights ε is lost in rounding.
"""

from __future__ import annotations

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.projection import dot
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run, answer_loss, repeated
from retain.models import params, passes


class SAM(Method):
    """Sharpness-aware minimisation."""

    family = "gradients"
    paper = "arXiv:2010.01412, eq. 2"
    edits_gradients = True
    turn = Turn.REPLACE
    repeats_batches = True
    off = {"radius": 0.0}

    class Config(MethodConfig):
        radius: float = Field(0.05, ge=0)
        """Length of the way to the worst point nearby, over all trained weights together; 0 is off."""

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        learning: list[torch.Tensor] = [p for p in params.trainable(model).values() if p.grad is not None]
        at_start: list[torch.Tensor] = [p.grad for p in learning if p.grad is not None]
        # the trainer's own gradient is ∇L(θ) unless it holds something else too
        here = at_start if run.plain_gradient else self.gradient(model, learning, run)[0]
        length = dot(here, here) ** 0.5
        if length == 0:
            return
        saved = [p.detach().clone() for p in learning]
        try:
            with torch.no_grad():
                torch._foreach_add_(learning, here, alpha=self.config.radius / length)
            there, loss = self.gradient(model, learning, run)
        finally:
            with torch.no_grad():  # from the copy: adding and subtracting does not lead back to the same bits
                torch._foreach_copy_(learning, saved)
        with torch.no_grad():
            if run.plain_gradient:
                torch._foreach_copy_(at_start, there)
            else:
                torch._foreach_sub_(there, here)
                torch._foreach_add_(at_start, there)
        run.log(f"loss/{self.name}", loss)

    def gradient(
        self, model: torch.nn.Module, learning: list[torch.Tensor], run: Run
    ) -> tuple[list[torch.Tensor], float]:
        """(∇L per parameter, L), L the mean cross-entropy of the step's supervised tokens over all ranks."""
        if not run.step_batches or not run.step_tokens:
            raise ConfigError("methods.sam: the rows of this step were not kept. Use `ContinualTrainer`.")
        device = learning[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            batches = ((b.inputs, b.labels) for b in repeated(run.step_batches, device))
            found, loss, _ = passes.gradients(model, learning, batches, answer_loss, run.reduce)
        torch._foreach_div_(found, run.step_tokens)
        return found, loss / run.step_tokens
