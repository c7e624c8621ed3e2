"""Train the tiny model under a budget, under torchrun. Arguments: output folder, probe file, rows per device."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from monitor_kit import TEXTS
from tiny import tiny_model, tiny_tokenizer
from training_kit import rows, stored, trainer

from retain.methods import build
from retain.training.budget import ForgettingBudget


def main(folder: Path, probes: str, batch: int) -> None:
    said: list[str] = []
    budget = ForgettingBudget(0.4, lose_at_most_nats=0.1, on=probes, anchors=TEXTS, every=2, jump=0.1, say=said.append)
    made = trainer(
        build([{"distill": {"rows": "all"}}, {"replay": {"fraction": 0.25}}]), folder / "run",
        tiny_model(tiny_tokenizer()).double(), train_rows=rows(24), steps=8, learning_rate=5e-3, batch=batch,
        adam_epsilon=1e-4, budget=budget,
    )  # fmt: skip
    made.train()
    state = PartialState()
    weights = {k: v.contiguous() for k, v in stored(made.model).items()}
    save_file(weights, folder / f"end-{state.process_index}.safetensors")
    (folder / f"said-{state.process_index}.txt").write_text("\n".join(said))
    state.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
