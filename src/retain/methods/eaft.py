"""EAFT — learns a token the less the surer the model is at its place.

    L = Σ_t w_t · (−log p_t) / N,  w_t = H_k(t) / ln k        (Diao et al. 2026, arXiv:2601.02151)

p_t = probability of the label, H_k = entropy of the k likeliest tokens, renormalised among themselves, of the model
in training and without gradient, N = supervised tokens. Where the model is sure, a label that it finds unlikely would
overwrite what it knows; where it is unsure there is something to learn and little to lose.
Deviations from the paper: weights are divided by their running mean, so that the steps keep their size;
    `normalise: false` is the form of the paper. The divisor is ln k, where the released code has 3 for k = 20. Tokens
    of replayed rows keep the weight 1 unless `rows: all`.
Needs: nothing.
Cost: one more product with the output head over the supervised tokens, and their top k; no copy of weights.
Combine with: replay, distill, lora, freeze, interpolate.   Conflicts: none.
Tune: nothing but `strength`, 0.5–1. Not for teaching facts that contradict the model: it blocks exactly those.
"""

from __future__ import annotations

import torch
from pydantic import Field

from retain.functional.token_scores import top_entropy
from retain.methods.base import Method
from retain.methods.context import Run, Tokens
from retain.methods.weighing import Weighing


class EAFT(Weighing, Method):
    """Entropy-adaptive fine-tuning."""

    name = "eaft"
    family = "tokens"
    paper = "arXiv:2601.02151"

    class Config(Weighing.Config):
        k: int = Field(20, ge=2)
        """Likeliest tokens whose entropy counts."""

    def weigh(self, tokens: Tokens, run: Run) -> torch.Tensor:
        return top_entropy(tokens.hidden, tokens.head, self.config.k)
