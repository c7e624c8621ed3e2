"""Whether a PEFT folder can be an expert: it fits the base, is whole, and changes nothing but what it adds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.config import ModelConfig
from retain.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Ways to begin with which PEFT changes the base weights when it loads the adapter.
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga", "mica")
#: Settings with which an adapter is more than low-rank changes that can share a batch with others.
_NOT_ALONE = {
    "use_dora": "rescales whole weights (DoRA)",
    "modules_to_save": "replaces whole layers",
    "trainable_token_indices": "replaces rows of the embedding",
    "layer_replication": "repeats layers of the base",
    "target_parameters": "changes single parameters",
    "alora_invocation_tokens": "begins in the middle of a prompt (aLoRA)",
    "megatron_config": "is split for Megatron",
}


@dataclass(frozen=True)
class About:
    """What the files of an adapter say.

    Args:
        rank: the largest.
        bytes: of its tensors.
        digest: of its file of weights.
    """

    rank: int
    bytes: int
    digest: str


def settings(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, when it can be an expert.

    Raises:
        ModelError: no adapter, or one that is more than low-rank changes.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(
            f"{folder}: no {CONFIG} here. Give a PEFT adapter's folder, or the directory of a finished run."
        )
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: damaged ({error}). Copy the adapter again.") from error
    advice = "Merge it into a model of its own (`retain export` for a run), or train with `lora` and its defaults."
    kind = found.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type {kind} given; experts are LORA, which can share a batch. {advice}")
    for key, what in _NOT_ALONE.items():
        if found.get(key):
            raise ModelError(f"{path}: {key} is set, so it {what}; experts add low-rank changes only. {advice}")
    if found.get("bias", "none") != "none":
        raise ModelError(f"{path}: bias '{found['bias']}' given, which replaces biases of the base; 'none'. {advice}")
    begin = found.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(_MOVE_THE_BASE):
        raise ModelError(
            f"{path}: init_lora_weights '{begin}' given, with which PEFT changes the base itself. Convert it to a "
            "plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
        )
    return found


def check(folder: Path, base: str) -> About:
    """Compare an adapter with its base, layer by layer and shape by shape; no weights of the base are read.

    Args:
        folder: with the adapter.
        base: the model that it is for, as `model.name` takes it.

    Raises:
        ModelError: as `settings`; files that are missing or damaged, numbers that are not finite, or weights that do
            not fit the base.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from retain.models.weightless import Weightless

    settings(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")))
        raise ModelError(
            f"{folder}: no {WEIGHTS} here{f', only {others}' * bool(others)}. Save the adapter again with PEFT's "
            "save_pretrained, which writes it."
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: damaged ({error}). Copy the adapter again.") from error
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            raise ModelError(
                f"{path}: {name} is a weight of the base, which an expert leaves alone. Save the adapter without it "
                "(save_pretrained with save_embedding_layers=False)."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: {name} holds numbers that are not finite. Train it again with a lower rate.")
    model = Weightless(ModelConfig(name=base)).model
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # the name that it has here is given
        with torch.device("meta"):
            wanted = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    except Exception as error:  # PEFT has many words for an adapter that does not fit
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(f"{folder}: does not fit '{base}' ({first}). Give the adapter's own base.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        here = shapes.get(name)
        there = tuple(wanted[name].shape) if name in wanted else None
        if here != there:
            raise ModelError(
                f"{path}: {name} is {_shape(here)} here and {_shape(there)} by {CONFIG} on '{base}'. It is damaged, or "
                "of another base; copy it again, or give its own base."
            )
    rank = max(min(shape) for name, shape in shapes.items() if "lora_A" in name or "lora_embedding_A" in name)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return About(rank, size, file_digest(path))


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape))
