"""Small experts on the tiny model: adapters that change what it says, and a library of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from retain.experts.library import ExpertLibrary

#: name → rank, target modules: of different sizes and on different layers.
EXPERTS = {
    "medicine": (4, ["q_proj", "v_proj"]),
    "poems": (8, ["q_proj", "down_proj"]),
    "history.v2": (2, ["o_proj"]),
}


@functools.cache
def _base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def base(folder: Path) -> Any:
    """A new copy of the model in a folder, in evaluation mode."""
    model = AutoModelForCausalLM.from_config(_base(folder).config).eval().requires_grad_(False)
    model.load_state_dict(_base(folder).state_dict())
    model.name_or_path = str(folder)
    return model


def adapter(
    model_folder: Path, to: Path, rank: int = 4, targets: Any = ("q_proj",), seed: int = 0, **more: Any
) -> Path:
    """A PEFT folder with random factors."""
    torch.manual_seed(seed)
    more.setdefault("init_lora_weights", False)
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **more)
    get_peft_model(base(model_folder), config).save_pretrained(to, save_embedding_layers=False)
    return to


def library(model_folder: Path, folder: Path) -> ExpertLibrary:
    """A library of `EXPERTS`; the folder of the adapters lies beside it."""
    found = ExpertLibrary(folder)
    for seed, (name, (rank, targets)) in enumerate(EXPERTS.items()):
        made = adapter(model_folder, folder.parent / "adapters" / name, rank, targets, seed)
        found.add(name, made, examples=[f"What is {name} {i}?" for i in range(4)])
    return found


def alone(model_folder: Path, adapter_folder: Path) -> Any:
    """What PEFT itself makes of an adapter: a new base with it alone."""
    return PeftModel.from_pretrained(base(model_folder), str(adapter_folder)).eval()


def edit(path: Path, **changes: Any) -> None:
    """Change settings in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
