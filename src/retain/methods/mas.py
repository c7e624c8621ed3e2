"""MAS — pulls each weight towards where it started, the harder the more the size of the outputs depends on it.

    L = L_new + (strength / 2) Σ_i Ω_i (θ_i − θ*_i)²,        Ω_i = E_x |∂ ‖f(x)‖² / ∂θ_i|

(Memory Aware Synapses, Aljundi et al. 2018, arXiv:1711.09601.) θ* = weights at the start of the task,
x = a row that stands for old data, f(x) = the logits at all its supervised positions, each position centred, as a
constant added to all logits changes no prediction. One gradient per row: those of different rows would cancel.
No label is used, only inputs. With LoRA the pull is on the product ΔW = s·BA with the rank-1 importance r cᵀ / Σr,
r and c the row and column sums of the Ω of the base weight.
Over several tasks Ω ← decay · Ω + Ω of the task that ended, with one anchor, the latest start. A streamed task adds
none, as its rows are not read again.
Deviations from the paper: Ω is scaled to mean 1 over all weights (of adapted layers those of ΔW), so `strength` means
    the same on every model and as in ewc; `units: raw` is the paper's form. It is taken on old rows before the first
    task too: a pretrained model has abilities to lose. The last hidden state, a common stand-in for f, is not offered:
    behind a final RMSNorm its length hardly depends on the weights.
Needs: old rows once: the user's, or written by the model.
Cost: one forward and backward pass for each of `samples` rows per task, and before the first, O(parameters) per step;
    two copies of the trainable weights.
Combine with: replay, distill, lora, freeze, interpolate; with `ewc` or `l2sp` the pulls add up.   Conflicts: none.
Tune: `strength` 0.01–10 in the gradient form; in the proximal form learning rate · strength · steps of 1–3.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from retain.functional import fisher, outputs, sensitivity
from retain.functional.tiled_head import Head
from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.remembering import Estimating
from retain.models import importance, params
from retain.models.pull import product_keys


class MAS(Estimating, Method):
    """Memory Aware Synapses."""

    name = "mas"
    family = "weights"
    paper = "arXiv:1711.09601"

    class Config(Estimating.Config):
        samples: int = Field(256, ge=1)
        """Rows that the importance is estimated on, at most; each costs a backward pass."""

    def importance(self, model: Any, run: Run, rows: Any) -> params.Tensors:
        """Ω by parameter name, of mean 1 over all weights; for adapted layers `<layer>.rows` and `<layer>.columns`, the
        sums of the base weight's Ω."""
        rows = rows.select(range(min(len(rows), self.config.samples)))
        dense, pairs = params.outside_lora(model), params.lora_pairs(model)
        estimates: dict[str, fisher.Importance] = {}
        if dense:
            estimates["dense"] = self._accumulate(model, run, rows, dense, by_sums=False)
        if pairs:
            with importance.base_weights(pairs, f"methods.{self.name}") as bases:
                estimates["adapted"] = self._accumulate(model, run, rows, bases, by_sums=True)
        self.scaled(**estimates)
        found = dict(estimates["dense"].diagonal) if dense else {}
        for name, pair in pairs.items():
            both = (estimates["adapted"].rows[name], estimates["adapted"].columns[name])
            found |= dict(zip(product_keys(name), both[::-1] if pair.transposed else both))
        return found

    def _accumulate(self, model: Any, run: Run, rows: Any, weights: dict, by_sums: bool) -> fisher.Importance:
        head = Head(*params.head(model), *params.logit_rules(model))

        def norm(sample: tuple[dict, torch.Tensor]) -> torch.Tensor | None:
            inputs, labels = sample
            learned = labels[:, 1:] != -100
            if not bool(learned.any()):
                return None
            return outputs.centred_norm(params.hidden_states(model, inputs)[:, :-1][learned], head)

        samples = run.track(run.batches(rows, 1), "importance of weights (MAS)", len(rows))
        return sensitivity.accumulate(weights, samples, norm, by_sums)
