"""MTT — keeps what the model thought of all tokens except the right one.

    L = L_new + strength · Σ_t KL(p⁰∖y_t ‖ p∖y_t) / N        (Mask the Target, Xu et al. 2026, arXiv:2605.29498)

p⁰ = the model at the start of the task, p = the model in training, p∖y = p without the label y and scaled to sum to 1
again, N = supervised tokens. The logit of the label gets no gradient from it, so the term never opposes what is
learned, as the whole divergence on new rows does.
Deviations from the paper: its abstract does not say in which direction the divergence is taken; forward here, unless
    told otherwise. The teacher is the start of each task, not the pretrained model. With a temperature both sides are
    softened, times T². The divergence is computed in tiles from hidden states, never as a batch × length × vocabulary
    tensor.
Needs: nothing but the task's rows.
Cost: one more forward pass over the rows it applies to; one copy of the trainable weights.
Combine with: lora (what it was made for), replay, freeze, interpolate, distill on replayed rows.   Conflicts: none.
Tune: `strength` 0.1–1.
"""

from __future__ import annotations

from typing import Literal

from retain.methods.base import Method
from retain.methods.distilling import Distilling


class MTT(Distilling, Method):
    """Mask the Target: the divergence from the past over all tokens but the label."""

    name = "mtt"
    family = "functions"
    paper = "arXiv:2605.29498"

    masks_label = True

    class Config(Distilling.Config):
        rows: Literal["all", "new", "replay"] = "all"
        """Where it applies: new rows, replayed rows, or both."""
