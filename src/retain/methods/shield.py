"""Shield — the columns of each weight that old inputs use most stay exactly as they were.

    s_j = Σ_i |W_ij| · ‖X_j‖,   W_:j = W*_:j for the largest share of s      (SSU, 2025, arXiv:2512.04844, §3)

W = weight [out, in] of a linear layer, W* at the start of the task, X = its inputs on rows that stand for old data,
so that s_j says how much input j contributes. With LoRA the same columns of s·BA are 0.
Deviations from the paper: works with LoRA, by holding columns of A at 0. Embeddings and head learn, apart from the
    rows of special tokens, which stay as in the authors' code; norms and biases learn.
Needs: old rows once: the user's, or written by the model.
Cost: one forward pass over `samples` rows per task, O(parameters) per step; one copy of the trainable weights (with
    LoRA of one factor).
Combine with: replay, distill, lora, ewc.
Conflicts: slao, shared_lora (whose adapters do not begin at zero), blocks and bottleneck (which move no old weight),
    subspace and ogd (which hold directions: no step obeys both).
Tune: `share` 0.5; more keeps more and learns less.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from retain.errors import ConfigError
from retain.functional.projection import column_scores, top_share
from retain.methods.base import Method, MethodConfig, Turn
from retain.methods.context import Run, withhold
from retain.models import params, passes
from retain.models.params import Tensors


class Shield(Method):
    """Source-shielded updates."""

    family = "isolation"
    paper = "arXiv:2512.04844"
    conflicts = {"slao": "shield needs adapters that begin at zero; those of slao do not"}
    edits_gradients = True
    turn = Turn.HOLD
    restrains_steps = True
    off = {"share": 0.0}

    class Config(MethodConfig):
        share: float = Field(0.5, ge=0, le=1)
        """Share of the columns of each weight that stay; 0 is off."""
        special_tokens: bool = True
        """Keep the embedding and head rows of special tokens, which hold chats together."""
        samples: int = Field(128, ge=1)
        """Rows of old data that inputs are taken from, at most."""
        batch_size: int = Field(8, ge=1)
        """Rows per pass over them; the scores do not depend on it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._masks: Tensors = {}

    def on_model_ready(self, model: torch.nn.Module, run: Run) -> None:
        """Choose the columns, and empty those of an adapter's A: it changes nothing, as B is 0."""
        layers = passes.linear_layers(model)
        if not layers:
            raise ConfigError("methods.shield: no linear layer learns. Remove shield, or freeze less.")
        if not passes.new_adapters(model, params.trainable(model)):
            raise ConfigError("methods.shield: an adapter has learned before. Merge it, and begin with a new one.")
        self._factors = {id(layer.pair.A) for layer in layers if layer.pair}
        if run.restored:
            return  # the checkpoint has the columns, and A as it was
        names = {id(p): name for name, p in params.trainable(model).items()}
        self._masks = self._columns(model, run, layers, names)
        for name, parameter in params.trainable(model).items():
            if name in self._masks and id(parameter) in self._factors:
                with torch.no_grad():
                    parameter.masked_fill_(self._masks[name].to(parameter.device).bool(), 0)

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        self._held = []  # (θ, θ*, mask)
        for name, parameter in params.trainable(model).items():
            if name in self._masks:
                start = torch.zeros_like(parameter) if id(parameter) in self._factors else run.start[name].to(parameter)
                self._held.append((parameter, start, self._masks[name].to(parameter.device).bool()))
        total = sum(p.numel() for p in params.trainable(model).values())
        held = sum(int(mask.sum()) * (p.numel() // mask.numel()) for p, _, mask in self._held)
        run.say(
            f"shield: {self.config.share:.0%} of the columns of {len(self._held)} weights stay as they are; "
            f"{total - held:,} of {total:,} trainable parameters learn."
        )

    def _columns(self, model: Any, run: Run, layers: list[passes.Linear], names: dict[int, str]) -> Tensors:
        """What stays, by parameter name: masks that broadcast against the parameter."""
        rows = run.old_rows(model, self.config.samples)
        rows = rows.select(range(min(len(rows), self.config.samples)))
        sums = passes.input_sums(model, layers, run.batches(rows, self.config.batch_size), products=False)
        masks: Tensors = {}
        for layer in layers:
            if layer.name not in sums:
                continue  # no old row reaches it (an expert that is never chosen): nothing to shield
            if not layer.weight.is_floating_point():
                raise ConfigError("methods.shield: a quantised weight has no columns to score. Set `quantize: none`.")
            mask = top_share(column_scores(layer.oriented(layer.weight.detach()), sums[layer.name]), self.config.share)
            learns = layer.pair.A if layer.pair else layer.weight
            masks[names[id(learns)]] = mask[:, None] if layer.transposed and not layer.pair else mask[None]
        ids = getattr(run.tokenizer, "all_special_ids", []) if self.config.special_tokens else []
        whole = params.causal(model)
        for outer in (whole.get_input_embeddings(), whole.get_output_embeddings()):
            weight = getattr(outer, "weight", None)
            if ids and weight is not None and id(weight) in names:
                mask = torch.zeros(len(weight), 1, dtype=torch.bool)
                mask[[i for i in ids if i < len(weight)]] = True
                masks[names[id(weight)]] = mask
        return masks

    @torch.no_grad()
    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        withhold(run, self.name, ((parameter, mask) for parameter, _, mask in self._held))

    @torch.no_grad()
    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        self._put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        for parameter, start, mask in self._held:
            parameter.copy_(torch.where(mask, start, parameter))

    def state_dict(self) -> Tensors:
        return {name: mask.to(torch.uint8) for name, mask in self._masks.items()}

    def load_state_dict(self, state: Tensors) -> None:
        self._masks = dict(state)
