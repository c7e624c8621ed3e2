"""Importances of weights outside the method that makes them: the file of a task, and the weights under adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from retain.errors import ConfigError
from retain.models import params
from retain.models.pull import product_keys


def save(importance: params.Tensors, path: Path) -> None:
    """Write an importance, whole or not at all; every process has the same one, the main process writes it."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        save_file({name: params.local(t).detach().cpu().contiguous() for name, t in importance.items()}, partial)
        partial.replace(path)


def load(path: Path, wanted: bool) -> params.Tensors | None:
    """The importance of a file, or None where it is not there or not wanted; no process writes before all looked."""
    known = wanted and path.is_file()
    PartialState().wait_for_everyone()
    return load_file(path) if known else None


def added(one: params.Tensors, other: params.Tensors) -> params.Tensors:
    """The sum of two importances; what only one of them knows is kept as it is."""
    total = {**one, **other}
    return total | {name: one[name].to(other[name].device) + other[name] for name in one.keys() & other.keys()}


def even(model: torch.nn.Module, value: float) -> params.Tensors:
    """The same importance for every trainable weight, and for every weight of an adapted layer."""
    found = {
        name: torch.full_like(p, value, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        for name, p in params.outside_lora(model).items()
    }
    for name, pair in params.lora_pairs(model).items():
        m, n = pair.B.shape[0], pair.A.shape[1]
        for key, length, other in zip(product_keys(name), (m, n), (n, m)):
            dtype = torch.promote_types(pair.B.dtype, torch.float32)
            found[key] = torch.full((length,), value * other, dtype=dtype, device=pair.B.device)
    return found


@contextmanager
def base_weights(pairs: dict[str, params.LoraPair], where: str) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The frozen weights under adapters by layer name, which require a gradient inside the block.

    Raises:
        ConfigError: they are quantised.
    """
    bases = {name: pair.base for name, pair in pairs.items()}
    if not all(base.is_floating_point() for base in bases.values()):
        raise ConfigError(f"{where}: a quantised base has no gradient. Use l2sp, or quantize: none.")
    asleep = [base for base in bases.values() if not base.requires_grad]
    for base in asleep:
        base.requires_grad_(True)
    try:
        yield bases
    finally:
        for base in asleep:
            base.requires_grad_(False)
