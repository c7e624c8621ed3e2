"""FLOW — learns a row the less the harder it was for the model at the start.

    L = Σ_i w_i · Σ_t (−log p_it) / N,  w_i = exp(−ℓ_i / τ),  τ = median ℓ        (Sanyal et al. 2025, arXiv:2502.02797)

ℓ_i = mean loss of the answer in row i under the model at the start of the task, p_it = probability of its token t now,
N = supervised tokens. A row of median difficulty weighs e⁻¹ before normalising.
Deviations from the paper: weights are divided by their running mean, so that the steps keep their size;
    `normalise: false` is the form of the paper. Tokens of replayed rows keep the weight 1 unless `rows: all`.
Needs: nothing.
Cost: one forward pass over the task's rows before training, on every rank, again after a resume; their losses in
    memory. Of a stream one more forward pass per step instead, with the median of the rows in the steps before (in the
    first step every row counts as the median one).
Combine with: replay, distill, lora, freeze, interpolate.   Conflicts: none.
Tune: `strength` 0.5–1; `unit: token` weighs within rows too. Rows that are hard because they are new are learned least.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from retain.functional.token_scores import LEAST_LOSS
from retain.methods.base import Method
from retain.methods.context import Run, Tokens
from retain.methods.weighing import WeighingByStart


class FLOW(WeighingByStart, Method):
    """Fine-tuning with pre-trained-loss-oriented weights: easy rows count more."""

    name = "flow"
    family = "tokens"
    paper = "arXiv:2502.02797"

    class Config(WeighingByStart.Config):
        unit: Literal["sequence", "token"] = "sequence"
        """What gets a weight of its own: the answer of a row, or each of its tokens."""

    @property
    def unit(self) -> Literal["token", "sequence"]:  # type: ignore[override]
        return self.config.unit

    def weigh(self, tokens: Tokens, run: Run) -> torch.Tensor:
        tau = self.limit(0.5)
        losses = self.start_losses(tokens)
        if tau is None:
            return torch.full_like(losses, math.exp(-1))
        return torch.exp(-losses / max(tau, LEAST_LOSS))
