"""Train the tiny model with several methods, alone or under torchrun. Arguments: output folder, rows per device."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import rows, stored, trainer

from retain.methods import build
from retain.methods.context import Run
from retain.training.watch import Record

# with a quarter of replay 24 rows are four full global batches of 8: nothing is filled up on several processes
ROWS = rows(24)
#: Other answers to the same prompts: A-GEM acts only where the new rows work against the old ones.
AGAINST = ROWS.map(lambda row: {"completion": [{"role": "assistant", "content": "sea cold ships land"}]})
CASES = {
    "none": [],
    "replay-distill": [{"replay": {"fraction": 0.25}}, "distill"],
    "ewc": [{"ewc": {"strength": 5.0, "samples": 8}}],
    "mas": [{"mas": {"strength": 5.0, "samples": 8}}],
    "si": [{"si": {"strength": 5.0}}],
    "agem": ["agem"],
    "sam": [{"sam": {"radius": 0.5}}, {"replay": {"fraction": 0.25}}],
    "l2sp": [{"l2sp": {"strength": 0.5}}],
    "self": [{"replay": {"fraction": 0.25, "rows": 6, "source": "self"}}],
    "on_policy": [{"replay": {"fraction": 0.25, "rows": 6, "source": "on_policy", "max_tokens": 24}}],
    "priority": [{"replay": {"fraction": 0.25, "priority": "forgetting", "measure_every": 1, "correction": 0.4}}],
    "key_layers": [{"key_layers": {"share": 0.5}}, {"replay": {"fraction": 0.25}}],
    "sources": [
        {
            "replay": {
                "fraction": 0.25,
                "every": 2,
                "spread": 0.5,
                "temperature": 2,
                "sources": ["old", {"data": "general.jsonl", "weight": 2}],
            }
        }
    ],
    "stages": [{"replay": {"fraction": 0.25}}, {"ewc": {"samples": 8}}, {"lora": {"r": 2}}],
}
#: Cases that also estimate, or record, the importance of their own task.
REMEMBER = ("stages", "mas", "si")


def main(folder: Path, batch: int) -> None:
    os.environ["RETAIN_CACHE"] = str(folder / "cache")  # no importance from a training on one process
    os.chdir(folder)
    with PartialState().main_process_first():
        lines = [json.dumps({"prompt": f"question {900 + i}", "response": "seven ships"}) for i in range(6)]
        Path("general.jsonl").write_text("\n".join(lines))
    for name, methods in CASES.items():
        place = folder / name
        run = Run(place, say=lambda line: None, shared=place / "shared", new_rows=ROWS if name in REMEMBER else None)
        made = trainer(
            build(methods),
            place,
            tiny_model(tiny_tokenizer()).double(),
            train_rows=ROWS,
            old=None if name == "self" else AGAINST if name == "agem" else rows(12, 100),
            steps=4,
            batch=batch,
            run=run,
            save_strategy="steps",
            save_steps=2,
            max_length=192,
            gradient_accumulation_steps=2,
            callbacks=[Record(place / "metrics.jsonl", name)],
        )
        made.train()
        state = PartialState()
        if state.is_main_process:
            save_file({k: v.contiguous() for k, v in stored(made.model).items()}, folder / f"{name}.safetensors")
        for method in made.stack.methods:
            if hasattr(method, "_importance"):
                save_file(method._importance, folder / f"{name}-fisher-{state.process_index}.safetensors")
        torch.save(made.seen, folder / f"{name}-seen-{state.process_index}.pt")
        state.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
