"""LoRA — learns a low-rank change of the linear layers and leaves the base weights alone.

    W' = W + s B A,   s = alpha / r                                  (Hu et al. 2021, arXiv:2106.09685, eq. 3)

A [r, in] random, B [out, r] zero, so training starts at the given model. Fewer directions can move, which
loses less of what the base could do; it is the carrier for most other methods at low cost.
Deviations from the paper: alpha defaults to 2r; all linear layers are adapted by default, not q and v alone.
    In a sequence, each task gets a fresh adapter and the previous one is merged into the base (a quantised
    base cannot be merged without loss, so there the same adapter goes on learning).
Cost: r·(in + out) trainable weights per layer, and their optimizer state; no extra pass.
Combine with: every other method.   Conflicts: none.
Tune: `r` 4–8 for a near domain, 16–32 for a far one; learning rate about ten times that of full fine-tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from retain.errors import ConfigError, unknown
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import params

TARGETS = {
    "qv": ("q", "v"),
    "attention": ("q", "k", "v", "o"),
}
_ALIASES = {
    "q": ("q_proj", "query", "q_lin", "wq"),
    "k": ("k_proj", "key", "k_lin", "wk"),
    "v": ("v_proj", "value", "v_lin", "wv"),
    "o": ("o_proj", "out_proj", "dense", "wo"),
}
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")


class LoRA(Method):
    """Low-rank adapters through PEFT."""

    family = "isolation"
    paper = "arXiv:2106.09685, eq. 3"
    adds_parameters = True
    off = {"r": 0}

    class Config(MethodConfig):
        r: int = Field(16, ge=0)
        """Rank; 0 turns LoRA off."""
        alpha: float | None = Field(None, gt=0)
        """Scale numerator; 2r when not given."""
        targets: Literal["qv", "attention", "all"] | list[str] = "all"
        """Which linear layers: q and v, all of attention, all linear layers, or module names."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Dropout on the adapter's input."""
        dora: bool = False
        """Weight-decomposed LoRA (arXiv:2402.09353)."""

    def prepare_model(self, model: Any, run: Run) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if hasattr(model, "peft_config"):
            if getattr(model, "is_quantized", False) or getattr(model.get_base_model(), "is_quantized", False):
                return model
            model = model.merge_and_unload()
        if getattr(model, "is_quantized", False):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        c = self.config
        torch.manual_seed(run.seed + run.task_index)  # A is random: the same run must draw the same A
        return get_peft_model(
            model,
            LoraConfig(
                r=c.r,
                lora_alpha=c.alpha or 2 * c.r,
                lora_dropout=c.dropout,
                target_modules=self._targets(model),
                use_dora=c.dora,
                task_type="CAUSAL_LM",
            ),
        )

    def _targets(self, model: torch.nn.Module) -> Any:
        chosen = self.config.targets
        if chosen == "all":
            return "all-linear"
        names = [name for name, _ in model.named_modules()]
        leaves = {name.rsplit(".", 1)[-1] for name in names}
        if isinstance(chosen, list):
            for wanted in chosen:
                if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                    raise ConfigError(unknown("methods.lora.targets", wanted, _linear(model)))
            return chosen
        found = {part: [alias for alias in _ALIASES[part] if alias in leaves] for part in TARGETS[chosen]}
        if not found["q"]:  # query, key and value in one layer
            found["q"] = [name for name in _FUSED if name in leaves]
        if not found["q"]:
            raise ConfigError(
                f"methods.lora.targets: '{chosen}' matches no layer of {type(model).__name__}. "
                "Use 'all', or list module names such as [q_proj, v_proj]."
            )
        return [name for aliases in found.values() for name in aliases]


def _linear(model: torch.nn.Module) -> set[str]:
    """Short names of the layers that an adapter fits on."""
    from transformers.pytorch_utils import Conv1D

    return {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}


def with_adapter(model: Any, run: Run) -> Any:
    """The model with a fresh adapter: the one that it got for this task, otherwise one with default settings.

    For methods that act on LoRA factors, so that they also work where `lora` is not listed.
    """
    pairs = params.lora_pairs(model).values()
    fresh = bool(pairs) and not any(bool(pair.B.any()) for pair in pairs)
    return model if fresh else LoRA().prepare_model(model, run)


def check_merged(name: str, model: Any) -> None:
    """Refuse a base on which adapters are not merged after a task, for methods that need a fresh one per task."""
    if getattr(params.causal(model), "is_quantized", False):
        raise ConfigError(
            f"methods.{name}: needs an adapter of its own for each task, merged afterwards, which a quantised base "
            "cannot take. Set `quantize: none`."
        )
