"""Blocks — adds decoder blocks that start as no change at all, and trains those alone.

    x ← x + Attention'(x);  x ← x + MLP'(x);  W'_out = 0, b'_out = 0 at the start   (Wu et al. 2024, arXiv:2401.02415)

x = hidden states; the primed parts are a copy of the block below, and W'_out, b'_out are their output projections, so
that the larger model begins as exactly the given one. Its own weights never move. In a sequence each task adds blocks
of its own above those of earlier tasks, which are frozen too and may be built upon (progressive networks, Rusu et al.
2016, stacked in place of lateral columns). What was added by which task is in the model's configuration, which
transformers opens as any other.
Deviations from the paper: where a norm stands behind a projection (Gemma 2), its scale is set to 0 in place of the
    projection, as it would make a first tiny step as large as any. No task number is needed afterwards, so an earlier
    task is not protected bit for bit: all blocks act. Architectures in which a block depends on its number in a way
    that the configuration cannot say, and mixtures of experts, are refused.
Needs: nothing.
Cost: 1/every more weights, time and cache per task, for good; gradients reach down to the lowest new block.
Combine with: replay, distill, ewc, interpolate (new blocks back towards none).
Conflicts: lora, olora, slao, ilora, shared_lora, bottleneck (all bring weights of their own and hold the rest); shield,
    subspace, packnet (they hold parts of old weights, none of which move); hft (a projection that it holds would stay
    at zero); ogd (whose directions are of the weights that learn in all tasks).
Tune: `every` 4, or `count: 1` for little data; learning rate about ten times that of full fine-tuning.
"""

from __future__ import annotations

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import expansion, params


class Blocks(Method):
    """Block expansion, progressive over a sequence of tasks."""

    family = "isolation"
    paper = "arXiv:2401.02415"
    adds_parameters = True
    conflicts = {
        **dict.fromkeys(
            ("lora", "olora", "slao", "ilora", "bottleneck"), "both bring weights of their own and hold the rest"
        ),
        **{
            name: f"{name} holds parts of old weights, none of which move here"
            for name in ("shield", "subspace", "packnet")
        },
        "hft": "the new projections begin at zero and would stay there where hft holds them",
    }
    off = {"every": 0, "count": None}

    class Config(MethodConfig):
        every: int = Field(4, ge=0)
        """One new block per so many of the model's own, evenly spread, and at least one; 0 is off."""
        count: int | None = Field(None, ge=1)
        """New blocks per task, in place of `every`."""
        share: bool = False
        """All tasks train the blocks of the first one, in place of blocks of their own."""

    def prepare_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        if hasattr(model, "peft_config") or getattr(model, "is_quantized", False):
            raise ConfigError(
                "methods.blocks: copies of adapted or quantised blocks cannot be trained. Merge the adapters, and set "
                "`quantize: none`."
            )
        own = expansion.marks(model).count(0)
        count = self.config.count or max(1, own // self.config.every)
        if count > own:
            raise ConfigError(f"methods.blocks.count: {count} new blocks for {own} old ones. Allowed: 1 to {own}.")
        there = expansion.newest(model) if self.config.share and run.task_index > 1 else []
        new = there or expansion.expand(model, count)
        model.requires_grad_(False)
        for block in new:
            block.requires_grad_(True)
        learning, total = params.counts(model)
        run.say(
            f"blocks: {len(new)} {'shared' if there else 'new'} of {len(params.decoder_layers(model))} blocks learn, "
            f"{learning:,} of {total:,} parameters."
        )
        return model
