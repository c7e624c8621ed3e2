"""Train the tiny model with and without a monitor, under torchrun. Arguments: output folder, probe file."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from monitor_kit import TEXTS, host
from training_kit import rows, stored, trainer

from retain.methods import build
from retain.training.monitor import ForgettingMonitor

CASES = {
    "plain": None,
    "warn": {},
    "stop": {"action": "stop", "max_forgetting": 0.01, "patience": 1},
    "restore": {"action": "restore", "score": "balance", "every": 1},
    "raise": {"action": "raise", "raised": "replay", "max_forgetting": 0.01, "patience": 1},
}


def main(folder: Path, probes: str) -> None:
    for name, settings in CASES.items():
        place = folder / name
        watch = []
        if settings is not None:
            # a list of lines on every process: what is said must be said once
            said: list[str] = []
            own = {"every": 2, "probes": [probes], "anchors": TEXTS, "say": said.append}
            watch = [ForgettingMonitor(**(own | settings))]
        if name == "raise":
            made = trainer(
                build([{"replay": {"fraction": 0.25}}]), place, train_rows=rows(24), callbacks=watch, steps=12,
                learning_rate=5e-2, batch=2, gradient_accumulation_steps=2,
            )  # fmt: skip
        else:
            made = host("sft", place, watch, learning_rate=5e-2, max_steps=30 if name == "restore" else 6)
        made.train()
        state = PartialState()
        weights = {k: v.contiguous() for k, v in stored(made.model).items()}
        save_file(weights, folder / f"{name}-{state.process_index}.safetensors")
        steps = made.state.global_step
        sources = [sum(s > 0 for s in one["source"]) for one in made.seen] if name == "raise" else []
        lines = "\n".join(said) if watch else ""
        (folder / f"{name}-{state.process_index}.txt").write_text(f"{steps}\n{sources}\n{lines}")
        state.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    torch.distributed.destroy_process_group()
