"""Checkpoints that can be trusted: written whole or not at all, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from retain.errors import RunError
from retain.models import bottleneck, params

STATE = "method_state.safetensors"
MARK = "complete.json"  # written last: sizes of all files, so that a half-written folder is never used
START = "start.safetensors"
BESIDE = "model/"  # before the names of weights among the methods' tensors


def complete(folder: Path, state: dict[str, torch.Tensor], model: Any = None) -> None:
    """Add the methods' tensors to a checkpoint, and what the host left out of the model, and mark it complete."""
    state = state | {BESIDE + name: p for name, p in _beside(model).items()}
    if state:
        _save({name: params.local(t).detach().cpu().contiguous() for name, t in state.items()}, folder / STATE)
    sizes = {
        str(f.relative_to(folder)): [f.stat().st_size, _digest(f)]
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != MARK
    }
    partial = folder / (MARK + ".part")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(sizes, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MARK)


def _beside(model: Any) -> dict[str, torch.nn.Parameter]:
    """Weights that the host does not write: of a model under PEFT it writes PEFT's own alone."""
    return bottleneck.weights(model) if hasattr(model, "peft_config") else {}


@torch.no_grad()
def put_back(folder: Path, model: Any) -> None:
    """Give weights that the host does not write the values that they have in a checkpoint."""
    held = _beside(model)
    kept = load_state(folder) if held else {}
    for name, parameter in held.items():
        parameter.copy_(kept[BESIDE + name])


def newest(output: Path) -> Path | None:
    """The newest complete checkpoint in a folder; unfinished ones (a run that was killed) are passed over."""
    found = [
        (int(match[1]), f)
        for f in (output.iterdir() if output.is_dir() else [])
        if (match := re.fullmatch(r"checkpoint-(\d+)", f.name)) and (f / MARK).is_file()
    ]
    return max(found)[1] if found else None


def resolve(wanted: Any, output: Path) -> Path | None:
    """The checkpoint to continue from: None/False for a fresh start, True for the newest, or a folder.

    Raises:
        RunError: none is there, or it is damaged.
    """
    if wanted is None or wanted is False:
        return None
    folder = newest(output) if wanted is True else Path(wanted)
    if folder is None:
        raise RunError(f"{output}: no complete checkpoint to continue from. Start without resuming.")
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Compare a checkpoint's files with what was written.

    Raises:
        RunError: a file is missing, of another size, or changed.
    """
    mark = folder / MARK
    if not mark.is_file():
        raise RunError(f"{folder}: this checkpoint was not finished. Use an earlier one, or start again.")
    try:
        expected = {name: (size, digest) for name, (size, digest) in json.loads(mark.read_text("utf-8")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{mark}: damaged ({error}). Delete the folder {folder}.") from error
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or _digest(file) != digest:
            raise RunError(
                f"{file}: damaged checkpoint (not as it was written). Delete the folder {folder}; "
                "the run then continues from the one before."
            )


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    """The methods' tensors of a checkpoint; empty when no method keeps any."""
    path = folder / STATE
    return load_file(path) if path.is_file() else {}


def start_weights(output: Path, model: Any, keep: bool, resumed: bool) -> params.Tensors:
    """The trainable weights at the beginning of a task; written once, read back when a run is continued."""
    path = output / START
    learning = params.trainable(model)
    if resumed and path.is_file():
        try:
            with safe_open(path, "pt") as file:
                if set(file.keys()) == set(learning):
                    return {name: file.get_tensor(name).to(learning[name].device) for name in learning}
        except SafetensorError as error:
            raise RunError(f"{path}: damaged ({error}). Delete the task's folder and run again.") from error
        raise RunError(
            f"{path}: holds other parameters than the model now trains. Use the same methods, or a new run directory."
        )
    weights = params.snapshot(learning)
    if keep:
        output.mkdir(parents=True, exist_ok=True)
        _save({name: params.local(t).cpu().contiguous() for name, t in weights.items()}, path)
    return weights


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial)
    os.replace(partial, path)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
