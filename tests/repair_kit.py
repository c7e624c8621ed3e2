"""A tiny base that knows something, and fine-tunes of it that learned something else and forgot, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from merge_kit import write_model
from peft import LoraConfig, get_peft_model
from run_kit import write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

COUNT = 24


def items(kind: str, right: str) -> list[dict[str, Any]]:
    """Choices after a short prompt, of which the same one is right in all; half of the prompts end in another way."""
    return [
        {
            "id": f"{kind}-{i}", "probe": kind, "prompt": f"{kind} {i} {'ships' if i % 2 else 'birds'}:",
            "choices": [" yes", " no"], "answer": int(right == "no"),
        }
        for i in range(COUNT)
    ]  # fmt: skip


def teach(model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int, rate: float) -> None:
    """Plain training on the right answers, all rows at once."""
    texts = [row["prompt"] + row["choices"][row["answer"]] for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    answer = len(tokenizer(rows[0]["choices"][rows[0]["answer"]])["input_ids"])
    labels = batch["input_ids"].clone()
    labels[:, :-answer] = -100
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_all(folder: Path) -> Path:
    """`base`, `full` (every weight learned) and `lora` (an adapter), and items: old.jsonl, new.jsonl."""
    torch.manual_seed(0)
    write_model(folder / "base", 0, initializer_range=0.1)
    words = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    teach(model, words, items("animal", "yes") + items("number", "yes"), 40, 3e-3)
    model.save_pretrained(folder / "base")
    teach(model, words, items("number", "no"), 20, 1e-3)
    model.save_pretrained(folder / "full")
    words.save_pretrained(folder / "full")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    teach(adapted, words, items("number", "no"), 20, 5e-3)
    adapted.save_pretrained(folder / "lora")
    write_lines(folder / "old.jsonl", items("animal", "yes"))
    write_lines(folder / "new.jsonl", items("number", "no"))
    return folder
