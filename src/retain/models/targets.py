"""Which linear layers an adapter goes on, in words that hold for every family of models."""

from __future__ import annotations

import torch

from retain.errors import ConfigError, unknown

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


def target_modules(model: torch.nn.Module, chosen: str | list[str]) -> str | list[str]:
    """What PEFT takes as `target_modules`, for a preset or for module names.

    Raises:
        ConfigError: a name or a preset that matches no layer.
    """
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
