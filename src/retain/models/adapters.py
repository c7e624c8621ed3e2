"""What a task leaves behind for later ones: a few tensors per task, in a folder of the run; and changed adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

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


@contextmanager
def beginning(model: Any, starts: params.Tensors) -> Iterator[params.Tensors]:
    """Beside every LoRA pair another one that begins: a B of zeros, which takes a gradient, and a given A.

    It changes nothing. Its gradient is the one that a fresh adapter with this A would have once the present one is
    merged into the base.

    Args:
        starts: A [r, in] by the name of the present parameter; a pair without one stays alone.

    Yields:
        B [out, r] by the name of the present parameter.
    """
    names = {id(p): name for name, p in params.trainable(model).items()}
    made: params.Tensors = {}
    handles = []

    def beside(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            change = linear(linear(args[0].to(a.dtype), a), b) * scaling
            return output + change.to(output.dtype)

        return hook

    try:
        for name, pair in params.lora_pairs(model).items():
            if names[id(pair.A)] not in starts:
                continue
            b = torch.zeros_like(pair.B, requires_grad=True)
            made[names[id(pair.B)]] = b
            hook = beside(starts[names[id(pair.A)]].to(pair.A), b, pair.scaling)
            handles.append(params.causal(model).get_submodule(name).register_forward_hook(hook))
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _file(folder: Path, task: int) -> Path:
    return folder / f"{task:02d}.safetensors"
