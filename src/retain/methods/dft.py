"""DFT — learns a token the less the less the model believes it already.

    L = Σ_t w_t · (−log p_t) / N,  w_t = sg[p_t]        (Wu et al. 2025, arXiv:2508.05629)

p_t = probability that the model in training gives to the label, sg = no gradient, N = supervised tokens. The gradient
is that of −p_t: rare labels no longer dominate a step.
Deviations from the paper: weights are divided by their running mean, so that the steps keep their size;
    `normalise: false` is the form of the paper. Tokens of replayed rows keep the weight 1 unless `rows: all`.
Needs: nothing.
Cost: one more product with the output head over the supervised tokens; no copy of weights.
Combine with: replay, lora, freeze, interpolate; with `distill: {strength: 0.1, rows: all}` it is ASFT
    (arXiv:2509.23753).   Conflicts: none.
Tune: `strength` 0.5–1. It can forget more than plain training (it did in the comparison of arXiv:2601.02151, table 1);
    measure it against that.
"""

from __future__ import annotations

import torch

from retain.methods.base import Method
from retain.methods.context import Run, Tokens
from retain.methods.weighing import Weighing


class DFT(Weighing, Method):
    """Dynamic fine-tuning: the label's own probability is its weight."""

    name = "dft"
    family = "tokens"
    paper = "arXiv:2508.05629"

    def weigh(self, tokens: Tokens, run: Run) -> torch.Tensor:
        return tokens.scores[0].exp()
