"""Bottleneck — learns a small network behind each feed-forward part and leaves the model's own weights alone.

    h ← h + W_up relu(W_down h + b₁) + b₂          (Houlsby et al. 2019, arXiv:1902.00751, section 2.1)

h = what a sub-layer adds to the stream of hidden states (d numbers), W_down [d/reduction, d] random, W_up [d,
d/reduction] zero, so that training starts at exactly the given model. The change is not linear, so it cannot be
merged into the weights: it stays on the model as a module of its own, and `retain export` writes it beside the base.
Deviations from the paper: behind the feed-forward part alone by default, as in AdapterFusion (arXiv:2005.00247);
    `attention: true` is both, as published. Norms are not trained. Where a family has no module for its feed-forward
    part (OPT), the adapter follows the whole block. In a sequence each task's adapter stands behind those of earlier
    tasks, which are frozen and act as well, so no task number is needed afterwards.
Needs: nothing.
Cost: 2dm + d + m weights per site and task, m = d/reduction, and their products in every pass, for good.
Combine with: replay, distill, ewc, interpolate, lora (its factors learn too, and are merged after the task).
Conflicts: blocks (both hold all but their own); shield, subspace, packnet (they hold parts of old weights, none of
    which move here); hft (W_up, where it is held, would stay at zero); ogd (whose directions are of the weights
    that learn in all tasks).
Tune: `reduction` 4–16; learning rate about ten times that of full fine-tuning.
"""

from __future__ import annotations

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import bottleneck, params


class Bottleneck(Method):
    """Serial bottleneck adapters."""

    family = "isolation"
    paper = "arXiv:1902.00751"
    adds_parameters = True
    adds_on_top = 2
    conflicts = {
        "blocks": "both bring weights of their own and hold the rest",
        **{
            name: f"{name} holds parts of old weights, none of which move here"
            for name in ("shield", "subspace", "packnet")
        },
        "hft": "the new weights begin at zero and would stay there where hft holds them",
    }
    off = {"reduction": 0.0}

    class Config(MethodConfig):
        reduction: float = Field(4.0, ge=0)
        """Width of the model over width of the adapter; 0 is off."""
        attention: bool = False
        """Also behind attention."""
        share: bool = False
        """All tasks train one adapter, in place of one each."""

    def prepare_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        whole = params.causal(model)
        if getattr(whole, "is_quantized", False):
            raise ConfigError("methods.bottleneck: a quantised base is not supported. Set `quantize: none`.")
        there = bottleneck.count(model)
        if self.config.share and run.task_index > 1 and there:
            number = there - 1
        else:
            # W_down is random: the same run must draw the same
            seed = run.seed + run.task_index
            number = bottleneck.add(model, self.config.reduction, self.config.attention, seed)
        mine = bottleneck.weights(model, number)
        frozen = bottleneck.weights(model) if hasattr(model, "peft_config") else dict(whole.named_parameters())
        for name, parameter in frozen.items():
            parameter.requires_grad_(name in mine)
        learning, total = params.counts(model)
        run.say(
            f"bottleneck: adapter {number + 1} behind {len(bottleneck.sites(model))} modules; "
            f"{learning:,} of {total:,} parameters learn ({learning / total:.1%})."
        )
        return model
