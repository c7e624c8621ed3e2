"""Which linear layers an adapter goes on, in words that hold for every family of models."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from retain.errors import ConfigError, unknown
from retain.models import params

_QUERIES = ("q_proj", "query", "q_lin", "wq")
_VALUES = ("v_proj", "value", "v_lin", "wv")
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")  # query, key and value in one layer


def target_modules(model: torch.nn.Module, chosen: str | list[str]) -> str | list[str]:
    """What PEFT takes as `target_modules`, for a preset or for module names.

    Raises:
        ConfigError: a name or a preset that matches no layer.
    """
    if chosen == "all":
        return "all-linear"
    names = [name for name, _ in model.named_modules()]
    if isinstance(chosen, list):
        for wanted in chosen:
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                raise ConfigError(unknown("methods.lora.targets", wanted, _short(_linear(model))))
        return chosen
    found = _attention(model) if chosen == "attention" else _queries_and_values(names)
    if not found:
        raise ConfigError(
            f"methods.lora.targets: '{chosen}' matches no layer of {type(model).__name__}. "
            "Use 'all', or list module names such as [q_proj, v_proj]."
        )
    return found


def _queries_and_values(names: list[str]) -> list[str]:
    leaves = _short(names)
    found = [[alias for alias in aliases if alias in leaves] for aliases in (_QUERIES, _VALUES)]
    return found[0] + found[1] if found[0] else [name for name in _FUSED if name in leaves]


def _attention(model: torch.nn.Module) -> list[str]:
    """The linear layers inside attention modules, told by their class: names of the output projection differ most.

    By short names, with the path inside the decoder layer where something else has the same one (GPT-2's `c_proj`).
    """
    paths: dict[str, str] = {}  # by full name, the name inside the decoder layer
    layers = {id(layer) for layer in params.decoder_layers(model)}
    for place, layer in [(name, module) for name, module in model.named_modules() if id(module) in layers]:
        for path, module in layer.named_modules():
            if "Attention" in type(module).__name__:
                paths |= {f"{place}.{path}.{name}": f"{path}.{name}" for name in _linear(module)}
    elsewhere = _short(_linear(model) - paths.keys())
    return sorted({path if _short([path]) & elsewhere else path.rsplit(".", 1)[-1] for path in paths.values()})


def _short(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def _linear(model: torch.nn.Module) -> set[str]:
    """Names of the layers that an adapter fits on."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
