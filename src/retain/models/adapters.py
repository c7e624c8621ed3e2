"""What a task leaves behind for later ones: a few tensors per task, in a folder of the run; and wider adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from retain.errors import RunError
from retain.models import params


def keep(tensors: params.Tensors, folder: Path, task: int) -> None:
    """Write the tensors of a task, whole or not at all; the main process does, the others hold the same.

    Args:
        tensors: by name.
        folder: made when it is not there; one file per task.
        task: its number, 1 for the first.
    """
    if not PartialState().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(folder, task)
    partial = path.with_name(path.name + ".part")
    save_file({name: params.local(t).detach().cpu().contiguous() for name, t in tensors.items()}, partial)
    partial.replace(path)


def kept(folder: Path, task: int) -> params.Tensors:
    """The tensors that a task left, on the CPU.

    Raises:
        RunError: that task left none, or the file is damaged.
    """
    path = _file(folder, task)
    if not path.is_file():
        raise RunError(
            f"{path}: task {task} left nothing here for later ones. Start the sequence again, or give the "
            "`Run` of this task the folder of the earlier ones as `shared`."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RunError(f"{path}: damaged ({error}). Run that task again.") from error


def widen(model: Any, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Give an adapted layer factors of another rank, at the same scale; so that it is kept with that rank."""
    layer: Any = params.causal(model).get_submodule(name)
    adapter = layer.active_adapters[0]
    layer.lora_A[adapter].weight = torch.nn.Parameter(a)
    layer.lora_B[adapter].weight = torch.nn.Parameter(b)
    layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = layer.r[adapter] = len(a)
    layer.lora_alpha[adapter] = layer.scaling[adapter] * len(a)
    config = model.peft_config[adapter]
    config.rank_pattern[name] = len(a)
    config.alpha_pattern[name] = layer.lora_alpha[adapter]


def _file(folder: Path, task: int) -> Path:
    return folder / f"{task:02d}.safetensors"
