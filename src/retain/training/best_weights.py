"""The trained weights at the best look, kept beside a monitor's baseline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from retain.errors import RunError
from retain.models import params


def path_of(folder: Path, step: int) -> Path:
    """Where the weights of a step are."""
    return folder / f"best-{step}.safetensors"


def keep(folder: Path, model: Any, step: int) -> None:
    """Write what is trained, whole or not at all; called on the main process."""
    weights = {name: p.detach().cpu().contiguous() for name, p in params.trainable(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "best.part"
    save_file(weights, partial)
    os.replace(partial, path_of(folder, step))


def drop(folder: Path, but: int | None) -> None:
    """Delete all but those of one step. Earlier bests stay until a checkpoint: a training goes on from there."""
    for path in folder.glob("best-*.safetensors"):
        if but is None or path != path_of(folder, but):
            path.unlink(missing_ok=True)


@torch.no_grad()
def put_back(folder: Path, model: Any, step: int) -> None:
    """Give the model the weights of a step: read by the main process, sent to the others.

    Raises:
        RunError: they cannot be read.
    """
    state, learning = PartialState(), params.trainable(model)
    if state.is_main_process:
        path = path_of(folder, step)
        try:
            weights = load_file(path)
            for name, parameter in learning.items():
                parameter.copy_(weights[name])
        except (SafetensorError, OSError, KeyError) as error:
            raise RunError(f"{path}: the best weights cannot be read ({error}). Take a checkpoint instead.") from error
    if state.num_processes > 1:
        for parameter in learning.values():
            torch.distributed.broadcast(parameter.data, 0)
