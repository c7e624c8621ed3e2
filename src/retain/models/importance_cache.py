"""Finds importances again: by the content of model and rows, and by the directory of another run.

Nothing is copied: the cache remembers, under a key of everything an importance depends on, which file of which run
holds it. A file that is gone, or holds something else by now, is not found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from retain.errors import ConfigError
from retain.models import importance, params
from retain.models.starter import cache_directory

FORM = 3  # of what is estimated; a change of an estimator's numbers makes old keys stale


def fingerprint(model: Any) -> str:
    """Hash of what a model computes with: all weights, without adapters that are still 0. "" for shards."""
    pairs = params.lora_pairs(model).values()
    idle = {id(p) for pair in pairs if not bool(pair.B.any()) for p in (pair.A, pair.B)}
    digest = hashlib.sha256()
    for name, parameter in params.causal(model).named_parameters():
        if id(parameter) in idle:
            continue
        if isinstance(parameter, DTensor):
            return ""
        _update(digest, name.replace(".base_layer", ""), parameter)
    return digest.hexdigest()


def key(model: Any, weights: str, batches: Iterable[tuple[dict[str, Any], torch.Tensor]], settings: Any) -> str:
    """Hash of a model (its `fingerprint`), of the rows as it reads them, of what is trained, and of settings.

    "" where the model has no fingerprint.
    """
    if not weights:
        return ""
    digest = hashlib.sha256(json.dumps([FORM, weights, settings], sort_keys=True).encode())
    for name, parameter in params.trainable(model).items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    kind = next(params.causal(model).parameters()).device.type
    digest.update(f"{kind} {torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)}".encode())
    for inputs, labels in batches:
        for name, value in sorted({**inputs, "labels": labels}.items()):
            if isinstance(value, torch.Tensor):
                _update(digest, name, value)
            else:
                digest.update(f"{name} {value}".encode())
    return digest.hexdigest()


def find(wanted: str) -> Path | None:
    """The file that holds the importance of a key, if it still does."""
    note = cache_directory() / "importance" / wanted
    if not wanted or not note.is_file():
        return None
    path = Path(note.read_text(encoding="utf-8"))
    return path if path.is_file() and importance.header(path).get("key") == wanted else None


def remember(wanted: str, path: Path) -> None:
    """Note which file holds the importance of a key; where the cache cannot be written nothing is remembered."""
    folder = cache_directory() / "importance"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{wanted}.{os.getpid()}.part"
        partial.write_text(str(path.absolute()), encoding="utf-8")
        partial.replace(folder / wanted)
    except OSError:
        return


def given(place: str, model: Any, method: str, where: str) -> Path:
    """The file behind the setting `importance`: itself, or of a run's directory the one made on these weights.

    Raises:
        ConfigError: there is none.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{where}: '{place}' is not there. Give a safetensors file, or the directory of a run.")
    files = sorted(path.glob("*/[0-9][0-9].safetensors"), key=lambda f: (f.parent.name != method, f))
    files = [file for file in files if importance.header(file)]
    weights = fingerprint(model) if files else ""
    for file in files:
        if weights and importance.header(file).get("weights") == weights:
            return file
    names = [str(file.relative_to(path)) for file in files]
    silent = [name for name, file in zip(names, files) if not importance.header(file).get("weights")]
    if silent:
        mine = [name for name in silent if Path(name).parent.name == method] or silent
        raise ConfigError(
            f"{where}: '{place}' holds {', '.join(silent)}, which do not say of which weights they are (of adapters "
            f"or si). Name the file that you mean: `importance: {path / mine[-1]}`."
        )
    held = f"holds {', '.join(names)}, of other weights" if files else "holds none"
    raise ConfigError(
        f"{where}: '{place}' {held}. Give the directory of a run with ewc, mas or si that began with this model, or "
        "one of its files."
    )


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
