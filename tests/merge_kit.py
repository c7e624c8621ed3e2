"""Tiny models and adapters to merge, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]


def write_model(folder: Path, seed: int, shard: str = "5GB", kind: str = "llama", **settings: Any) -> Path:
    """A random model; in bfloat16 and so on with `dtype`."""
    dtype = settings.pop("dtype", torch.float32)
    tokenizer = settings.pop("tokenizer", None) or tiny_tokenizer()
    tiny_model(tokenizer, seed, kind, **settings).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, seed: int, rank: int = 4, **settings: Any) -> Path:
    """A LoRA adapter whose factors are random."""
    settings = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 2 * rank, **settings}
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def weights(folder: Path) -> Tensors:
    """Of a model, as transformers reads it."""
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def with_adapter(base: Path, adapter: Path) -> Tensors:
    """Of the base with an adapter merged by PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return dict(model.merge_and_unload().state_dict())


def changes(base: Path, adapter: Path) -> Tensors:
    """What an adapter does to its base, in float64."""
    before, after = weights(base), with_adapter(base, adapter)
    return {name: after[name].double() - before[name].double() for name in before}
