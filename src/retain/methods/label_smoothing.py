"""Label smoothing — bounds how much likelier than the rest a label is made.

    L = Σ_t CE(q_t, p_t) / N = L_new + strength · Σ_t (z_y − z̄) / N        (Szegedy et al. 2016, arXiv:1512.00567, §7)

q_t = (1 − strength) · one-hot label + strength / V, p_t = the model's distribution, z_y and z̄ = logit of the label and
mean logit of the vocabulary of V tokens, N = supervised tokens. The loss has its minimum at finite logits, so what was
likely before is not pushed down without end.
Deviations from the paper: none in the value. It is made from hidden states and the mean row of the output head, never
    from all logits (tile by tile where the architecture caps its logits); set no `label_smoothing_factor` beside it.
    Replayed rows are not smoothed unless `rows: all`; weights of other methods do not act on this term.
Needs: nothing.
Cost: the mean of the output head's rows per micro-batch, with capped logits one more product with the head; no copy of
    weights.
Combine with: replay, distill, lora, freeze, interpolate.   Conflicts: none.
Tune: `strength` 0.05–0.2.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.tiled_head import Head
from retain.functional.token_scores import label_margin
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Batch, Run
from retain.models import params

#: Largest strength that a boost leads to.
MOST = 0.9


class LabelSmoothing(Method):
    """Cross-entropy with smoothed labels, without logits."""

    family = "tokens"
    paper = "arXiv:1512.00567, §7"

    class Config(MethodConfig):
        strength: float = Field(0.1, ge=0, lt=1)
        """Share of the label's probability that is spread evenly over the vocabulary; 0 is off."""
        rows: Literal["new", "all"] = "new"
        """Whose labels are smoothed; replayed rows keep theirs unless `all`."""

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        mask = batch.supervised
        if self.config.rows == "new":
            if len(batch.source) != len(batch.labels):
                raise ConfigError(
                    "methods.label_smoothing.rows: rows are flattened by padding-free packing, so new and replayed "
                    "ones cannot be told apart. Set `rows: all` or `padding_free: false`."
                )
            mask = mask & (batch.source == 0)[:, None]
        if not bool(mask.any()):
            return None
        head = Head(*params.head(run.model), *params.logit_rules(run.model))
        margin = label_margin(batch.hidden[:, :-1][mask], head, batch.labels[:, 1:][mask])
        # a budget or a monitor may multiply it: at 1 nothing is learned, beyond it the label is unlearned
        most = max(self.config.strength, MOST)
        return min(self.config.strength, most / self.boost) * margin.sum()
