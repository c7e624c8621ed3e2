"""Importances of weights outside the method that makes them: their files, where they come from, and their sums.

A file (safetensors) holds F by parameter name, for an adapted layer `<layer>.rows` and `<layer>.columns`, and in its
header what it was made of (`ABOUT`). All methods write and read the same form, so that one may take another's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retain.errors import ConfigError, RunError
from retain.models import params
from retain.models.pull import product_keys

#: What a header says: method, estimator, name and content of the model, rows that were read, units ("normalised" or
#: "raw"), mean of F over the file's ordinary and over its adapted weights in raw units (`means`) and as the file holds
#: it (`held`: where normalised both together have 1 or more, as tasks add up), tasks that were added, number of decoder
#: layers, key of the cache (only where the content is what that key stands for).
ABOUT = ("method", "estimator", "model", "weights", "rows", "units", "means", "held", "tasks", "layers", "key")


@dataclass
class Importance:
    """F by name, as a file holds it, and what the header says."""

    tensors: params.Tensors
    about: dict[str, Any] = field(default_factory=dict)


def save(importance: Importance, path: Path) -> None:
    """Write an importance, whole or not at all; every process has the same one, the main process writes it."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        tensors = {name: params.local(t).detach().cpu().contiguous() for name, t in importance.tensors.items()}
        about = importance.about | {"held": own_means(tensors)}
        save_file(tensors, partial, {"retain": json.dumps(about)})
        partial.replace(path)


def load(path: Path, wanted: bool) -> Importance | None:
    """The importance of a file, or None where it is not there or not wanted; no process writes before all looked."""
    known = wanted and path.is_file()
    PartialState().wait_for_everyone()
    return read(path) if known else None


def read(path: Path) -> Importance:
    """The importance of a file.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("retain", "{}"))
            return Importance({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path}: no importance can be read from it ({error}). Delete it, or give another.") from None


def header(path: Path) -> dict[str, Any]:
    """What the header of a file says; empty where there is none."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("retain", "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}


def added(one: params.Tensors, other: params.Tensors, decay: float = 1.0) -> params.Tensors:
    """decay · one + other; what only one of them knows counts as 0 in the other."""
    kept = one if decay == 1 else {name: tensor * decay for name, tensor in one.items()}
    total = {**kept, **other}
    return total | {name: kept[name].to(other[name].device) + other[name] for name in kept.keys() & other.keys()}


def own_means(tensors: params.Tensors) -> dict[str, float]:
    """Mean of F over the ordinary ("dense") and over the adapted weights, as the tensors hold it."""
    return {group: total / count for group, (total, count) in _sums(tensors).items()}


def raw_means(parts: list[tuple[Importance, float]], total: params.Tensors) -> dict[str, float]:
    """Means in raw units of a total of parts, each times its factor; without a group that a part knows nothing of."""
    found: dict[str, float] = {}
    unknown = set()
    for part, factor in parts:
        for group, (own, _) in _sums(part.tensors).items() if factor else ():
            scale = _to_raw(part, group)
            if scale is None:
                unknown.add(group)
            else:
                found[group] = found.get(group, 0.0) + factor * scale * own
    counts = {group: count for group, (_, count) in _sums(total).items()}
    return {group: value / counts[group] for group, value in found.items() if group not in unknown}


def _to_raw(found: Importance, group: str) -> float | None:
    """By what F must be multiplied to be in raw units, None if unknown; adapted weights may stem from ordinary ones."""
    if found.about.get("units", "normalised") == "raw":
        return 1.0
    means, held = found.about.get("means", {}), found.about.get("held") or own_means(found.tensors)
    known = next((g for g in (group, "dense") if means.get(g) and held.get(g)), None)
    return None if known is None else means[known] / held[known]


def _sums(tensors: params.Tensors) -> dict[str, tuple[float, int]]:
    """Total of F and number of weights, of ordinary and of adapted weights, where there are any."""
    found: dict[str, tuple[float, int]] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        rows, columns = product_keys(layer)
        if kind in ("rows", "columns") and rows in tensors and columns in tensors:
            if kind == "columns":
                continue
            group, count = "adapted", len(tensor) * len(tensors[columns])
        else:
            group, count = "dense", tensor.numel()
        total, counted = found.get(group, (0.0, 0))
        found[group] = total + float(params.local(tensor).sum(dtype=torch.float64)), counted + count
    return found


def with_held(found: Importance) -> dict[str, Any]:
    """The header with the means as the tensors hold them, which a part of the tensors must be read by."""
    return found.about | {"held": found.about.get("held") or own_means(found.tensors)}


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """What an importance of all that a model trains holds: shapes by name."""
    found = {name: tuple(p.shape) for name, p in params.outside_lora(model).items()}
    for name, pair in params.lora_pairs(model).items():
        found |= dict(zip(product_keys(name), ((pair.B.shape[0],), (pair.A.shape[1],))))
    return found


def summed(tensors: params.Tensors, model: Any) -> params.Tensors:
    """With the row and column sums of every whole weight that lies under an adapter and has none."""
    found = dict(tensors)
    for name, pair in params.lora_pairs(model).items():
        keys, whole = product_keys(name), f"{name}.weight"
        if keys[0] not in found and whole in found and found[whole].dim() == 2:
            sums = found[whole].sum(1), found[whole].sum(0)
            found |= dict(zip(keys, sums[::-1] if pair.transposed else sums))
    return found


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


def fitting(found: Importance, model: Any, where: str) -> Importance:
    """The part of an importance that this model trains; of a whole weight under an adapter its row and column sums.

    Raises:
        ConfigError: something that is trained has no importance, or one of another shape; or the model has another
            number of decoder layers, so that the same name is another weight.
    """
    layers, now = found.about.get("layers"), len(params.decoder_layers(model))
    if layers not in (None, now):
        raise ConfigError(
            f"{where}: it is of a model with {layers} decoder layers, this one has {now}. Give an importance of this "
            "model, or remove the setting."
        )
    wanted, tensors = shapes(model), summed(found.tensors, model)
    for name, shape in wanted.items():
        if name not in tensors:
            raise ConfigError(
                f"{where}: nothing about '{name}', which is trained; it holds {len(found.tensors)} tensors such as "
                f"'{next(iter(found.tensors), 'none')}'. Give an importance of this model, or remove the setting."
            )
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(
                f"{where}: '{name}' has the shape {tuple(tensors[name].shape)}, in the model {shape}. Give an "
                "importance of this model, or remove the setting."
            )
    part = {name: tensors[name] for name in wanted}
    about = {key: value for key, value in found.about.items() if key != "key"}  # it is of the whole file
    if "means" in about:
        about["means"] = raw_means([(Importance(part, with_held(found)), 1.0)], part)
    return Importance(part, about | {"held": own_means(part)})


def in_units(found: Importance, model: Any, units: str, where: str) -> Importance:
    """The same in "normalised" or "raw" units: of a mean of 1, or of the mean that the header remembers.

    After several tasks each part had its own mean, so the raw form has the mean of what a raw run adds up, but weighs
    the tasks as the normalised form did.

    Raises:
        ConfigError: raw units are wanted, and the header says nothing about the mean.
    """
    have = found.about.get("units", "normalised")
    if have == units:
        return found
    groups = {"dense": list(params.outside_lora(model)), "adapted": list(params.lora_pairs(model))}
    tensors, mean = dict(found.tensors), _mean(found.tensors, model)
    for group, names in groups.items():
        if not names:
            continue
        if units == "raw":
            scale = _to_raw(found, group)
            if scale is None:
                raise ConfigError(f"{where}: its header says no mean in raw units. Set `units: normalised`.")
            factor = scale
        else:
            factor = 1 / mean
        for name in names:
            for key in product_keys(name) if group == "adapted" else (name,):
                tensors[key] = tensors[key] * factor
    about = {key: value for key, value in found.about.items() if key != "key"}  # it is of the other units
    return Importance(tensors, about | {"units": units, "held": own_means(tensors)})


def _mean(tensors: params.Tensors, model: Any) -> float:
    """Mean of F over all that a model trains, adapted weights and ordinary ones together."""
    sums = _sums({key: tensors[key] for key in shapes(model)}).values()
    return max(sum(t for t, _ in sums) / sum(c for _, c in sums), torch.finfo(torch.float64).tiny)


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
