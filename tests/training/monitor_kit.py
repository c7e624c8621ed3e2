"""Trainings of the tiny model under three hosts, with probes that it is sure to lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from run_kit import write_lines
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import rows, stored
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from retain.probes.base import Subject
from retain.probes.suite import load_probes
from retain.training.monitor import ForgettingMonitor

TEXTS = ["Seven small ships sailed over the sea.", "The heart pumps blood.", "Rome is the capital of Italy."]


def habits(path: Path) -> Path:
    """Questions whose right answer is what the untrained tiny model chooses: it has all of them right, and training
    at a high rate loses some."""
    choices = ["the bird", "seven ships", "blood", "Rome", "prompt"]
    items = [
        {
            "id": f"h{i}",
            "probe": "habits",
            "prompt": f"What is {i}?",
            "choices": choices[i % 2 : i % 2 + 4],
            "answer": 0,
        }
        for i in range(10)
    ]
    write_lines(path, items)
    outcomes = load_probes(path)[0].look(Subject(tiny_model(tiny_tokenizer()), tiny_tokenizer()))
    for item, outcome in zip(items, outcomes, strict=True):
        item["answer"] = item["choices"].index(outcome.output)
    texts = [{"id": f"t{i}", "probe": "prose", "text": text} for i, text in enumerate(TEXTS)]
    write_lines(path, [*items, *texts])
    return path


def host(kind: str, folder: Path, callbacks: Any = (), model: Any = None, **settings: Any) -> Any:
    """A `transformers.Trainer`, an `SFTTrainer` or a `DPOTrainer` on the tiny model with dropout, two micro-batches a
    step, activations made again."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, attention_dropout=0.1) if model is None else model
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "learning_rate": 3e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    } | settings
    common = {"processing_class": tokenizer, "callbacks": list(callbacks)}
    made: Any
    if kind == "trainer":
        texts = [f"question {i} {row['completion'][0]['content']}" for i, row in enumerate(rows(24))]
        encoded = [tokenizer(text) for text in texts]
        data = Dataset.from_list([{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in encoded])
        made = Trainer(
            model,
            TrainingArguments(**given),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=data,
            **common,
        )
    elif kind == "sft":
        made = SFTTrainer(model, SFTConfig(**given, max_length=64), train_dataset=rows(24), **common)
    else:
        pairs = Dataset.from_list([{**row, "chosen": row["completion"], "rejected": OTHER} for row in rows(24)])
        pairs = pairs.remove_columns("completion")
        args = DPOConfig(**given, max_length=64)
        made = DPOTrainer(model, tiny_model(tokenizer), args=args, train_dataset=pairs, **common)
    made.remove_callback(PrinterCallback)
    return made


OTHER = [{"role": "assistant", "content": "sea cold ships land"}]


def kept(folder: Path, probes: str) -> None:
    """A training with a checkpoint at every look, which goes on from the newest whole one (the host writes its state
    last); leaves `end.safetensors`."""
    monitor = ForgettingMonitor(every=2, probes_every=2, probes=[probes], anchors=TEXTS, checkpoint=True)
    made = host("sft", folder, [monitor], max_steps=14, learning_rate=1e-2)
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda place: int(place.name.rpartition("-")[2]), default=None)
    made.train(resume_from_checkpoint=None if newest is None else str(newest))
    save_file({k: v.contiguous() for k, v in stored(made.model).items()}, folder / "end.safetensors")


def looks(path: Path) -> list[dict[str, Any]]:
    """The records of a log without what differs between two runs: time and duration."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in found if r["kind"] == "monitor"]
