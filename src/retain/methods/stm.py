"""STM — leaves out the tokens that the model found unlikely before it learned anything.

    L = Σ_t w_t · (−log p_t) / N,  w_t = 1 if exp(ℓ_t) ≤ threshold, else 0        (Wu et al. 2025, arXiv:2501.14315)

ℓ_t = loss of token t under the model at the start of the task, p_t = its probability now, N = supervised tokens, those
left out included. What is left is in the model's own words. `stm/weight` in the log is the share that is learned.
Deviations from the paper: the first token of an answer is judged like the others, as it is all that an answer of one
    word teaches; `skip_first: true` always leaves it out, as the paper does. The paper takes the mean over the tokens
    that are left of a batch; here weights are divided by their running mean over steps, which comes to nearly the same.
    `normalise: false` divides by all supervised tokens, and takes smaller steps. Where fewer tokens than the share
    `least` pass, the threshold is raised for it (`least: 0` is the form of the paper, which can leave nothing to
    learn). Tokens of replayed rows are kept, unless `rows: all` weighs them too.
Needs: nothing.
Cost: one forward pass over the task's rows before training, on every rank, again after a resume; their losses in
    memory. Of a stream one more forward pass per step instead, and `least` counts the steps before.
Combine with: replay, distill, lora, freeze, interpolate.   Conflicts: none.
Tune: `threshold` 2–10. Not for teaching new facts: their tokens are the ones that are left out.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from retain.methods.base import Method
from retain.methods.context import Run, Tokens
from retain.methods.weighing import WeighingByStart
from retain.models.start_scores import sequences


class STM(WeighingByStart, Method):
    """Selective token masking: only tokens of low perplexity are learned."""

    name = "stm"
    family = "tokens"
    paper = "arXiv:2501.14315"

    class Config(WeighingByStart.Config):
        threshold: float = Field(2.5, ge=1)
        """Highest perplexity of a token that is learned; 2.5 is a probability of 0.4."""
        least: float = Field(0.1, ge=0, lt=1)
        """Share of the tokens that is learned at least, the likeliest; 0 holds the threshold whatever it leaves."""
        skip_first: bool = False
        """Leave out the first token of every answer, whatever its perplexity (also of those that `least` lets in)."""
        normalise: bool = True
        """Keep the mean weight at 1, which is nearly the form of the paper; false also takes smaller steps."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        super().on_task_start(model, run)
        lowest = self.limit(self.config.least) if self.config.least else None
        if lowest is not None and lowest > math.log(self.config.threshold):
            run.say(
                f"stm: fewer than {self.config.least:.0%} of the tokens have a perplexity up to "
                f"{self.config.threshold:g}; the threshold is raised to {math.exp(lowest):.3g} for this task."
            )

    def weigh(self, tokens: Tokens, run: Run) -> torch.Tensor:
        highest = math.log(self.config.threshold)
        if self.config.least:
            highest = max(highest, self.limit(self.config.least) or 0.0)
        losses = self.start_losses(tokens)
        learned = losses <= highest
        return (learned & ~_first(tokens) if self.config.skip_first else learned).to(losses.dtype)


def _first(tokens: Tokens) -> torch.Tensor:
    """Mask [N] of the tokens that begin an answer: what stands before them in their sequence is not learned."""
    batch = tokens.batch
    owner, learned = sequences(batch.inputs, batch.labels), batch.labels != -100
    goes_on = learned[:, :-1] & (owner[:, :-1] == owner[:, 1:])
    rows = tokens.rows.unique()
    return ~goes_on[rows][batch.supervised[rows]]
