"""Fit the first half of real trainings, forecast their second half, and count what the intervals cover.

    python bench/dynamics.py                          # trains what is missing, prints the table
    python bench/dynamics.py --out bench/out/dynamics # trains all anew, in minutes
    python bench/dynamics.py --write docs/dynamics.md # puts the table into the page

Three trainings are of bench/small_world.py, which learns its second family of facts while its first is watched; one is
of the starter model, on examples/data/tickets, while beginnings of the texts of examples/data/plain.txt are watched.
Forgetting is measured by a cheap proxy at every few steps: the rise over the base of the loss, in nats per token. The
learning rate is constant, as the curves assume.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import small_world
from transformers import TrainerCallback

from retain.functional import dynamics
from retain.report.dynamics import read_looks
from retain.results import append

DATA = Path(__file__).parent.parent / "examples" / "data"
RESULTS = Path(__file__).parent / "results" / "dynamics"
BATCH, LONGEST, WORDS = 4, 48, 20  # of the starter model: rows; tokens of a row; words of a watched text


@dataclass(frozen=True)
class Training:
    """What is trained, and how. `rank` of the adapter; 0: all weights."""

    model: str
    rank: int
    rate: float
    steps: int
    every: int  # steps from look to look


RUNS = {
    "world-full": Training("world", 0, 3e-4, 60, 3),
    "world-fast": Training("world", 0, 1e-3, 60, 3),
    "world-lora": Training("world", 8, 3e-3, 60, 3),
    "tickets-lora": Training("starter", 16, 1e-3, 24, 3),
}


class Monitor(TrainerCallback):
    """Writes the rise of a loss over the base, before training and every few steps."""

    def __init__(self, path: Path, loss: Callable[[Any], float], every: int) -> None:
        self.path, self.loss, self.every = path, loss, every
        self.base: float | None = None

    def look(self, model: Any, step: int) -> None:
        nats = self.loss(model)
        self.base = nats if self.base is None else self.base
        append(self.path, {"kind": "monitor", "step": step, "loss_rise": nats - self.base})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.look(model, state.global_step)


def starter(name: str) -> tuple[Any, Any, Any, Callable[[Any], float]]:
    """The starter model (or another), its tokenizer, rows to learn, and the loss on texts that are watched."""
    from datasets import load_dataset

    from retain.models.likelihood import text_log_likelihood
    from retain.models.load import load_model

    model, tokenizer = load_model(name)
    rows = load_dataset("json", data_files=str(DATA / "tickets" / "train.jsonl"), split="train")
    # without the chat template's own tokens, which would be most of such short rows
    rows = rows.map(lambda row: {"text": f"{row['prompt']} {row['response']}"}, remove_columns=rows.column_names)
    whole = (DATA / "plain.txt").read_text(encoding="utf-8").split("\n\n")
    texts = [" ".join(text.split()[:WORDS]) for text in whole if text.strip()]

    def loss(trained: Any) -> float:
        scores = text_log_likelihood(trained, tokenizer, texts)
        return -sum(score.log_likelihood for score in scores) / sum(score.tokens for score in scores)

    return model, tokenizer, rows, loss


def world(training: Training, seed: int = 0) -> tuple[Any, Any, Any, Callable[[Any], float]]:
    """The small world's model, its tokenizer, rows of B to learn, and the loss on answers of A."""
    model = small_world.pretrained(seed, Path("bench/out/two_tasks/base"))
    rows = small_world.chat(small_world.lessons("B", 16 * training.steps, seed))
    return model, small_world.tokenizer(), rows, lambda trained: small_world.answer_loss(trained, "A")


def train(training: Training, folder: Path, model: str | None = None) -> None:
    """One training with its looks, in `folder`/metrics.jsonl; `model` in the place of the starter model."""
    from trl import SFTConfig

    from retain import ContinualTrainer, LoRA
    from retain.cli.common import quiet_libraries

    quiet_libraries()
    small = training.model == "world"
    weights, tokenizer, rows, loss = world(training) if small else starter(model or training.model)
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as elsewhere:
        args = SFTConfig(
            elsewhere, max_steps=training.steps, per_device_train_batch_size=16 if small else BATCH,
            learning_rate=training.rate, lr_scheduler_type="constant", max_length=32 if small else LONGEST, seed=0,
            save_strategy="no", report_to="none", logging_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        ContinualTrainer(
            weights, args, train_dataset=rows, processing_class=tokenizer,
            methods=[LoRA(r=training.rank)] if training.rank else [],
            callbacks=[Monitor(metrics, loss, training.every)],
        ).train()  # fmt: skip


@dataclass(frozen=True)
class Check:
    """How far the forecasts of the second half were from what was seen, and how many intervals held it."""

    run: str
    law: str
    fitted: int
    looks: int
    seen: float  # at the last look
    forecast: dynamics.Forecast  # of the last look
    error: float  # mean |forecast − seen| over the second half
    covered: int


def check(name: str, folder: Path, law: dynamics.Law) -> Check:
    """Fit the first half of the looks of a run and compare the rest."""
    looks = read_looks(folder)
    steps, lost = np.array(looks.steps, dtype=float), np.array(looks.forgetting)
    first = steps <= steps[-1] / 2
    fit = dynamics.fit(steps[first], lost[first], law=law)
    later = [dynamics.forecast(fit, step) for step in steps[~first]]
    covered = sum(f.low <= value <= f.high for f, value in zip(later, lost[~first]))
    error = float(np.mean([abs(f.value - value) for f, value in zip(later, lost[~first])]))
    return Check(name, law, int((first & (steps > 0)).sum()), len(later), float(lost[-1]), later[-1], error, covered)


def table(checks: list[Check]) -> str:
    lines = [
        "| run | law | looks fitted | rise at the last look, nats | forecast of it | mean error, nats "
        "| intervals that held |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.run} | {c.law} | {c.fitted} | {c.seen:.3f} | {c.forecast.value:.3f} [{c.forecast.low:.3f}, "
        f"{c.forecast.high:.3f}] | {c.error:.3f} | {c.covered} of {c.looks} |"
        for c in checks
    ]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="in the place of the starter model")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where looks are kept; a run that is there is not made"
    )
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args(words)
    for name in given.runs:
        folder, start = given.out / name, time.monotonic()
        if not (folder / "metrics.jsonl").is_file() or read_looks(folder).steps[-1] < RUNS[name].steps:
            train(RUNS[name], folder, given.model)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    found = table([check(name, given.out / name, law) for name in given.runs for law in dynamics.LAWS])
    print(found)
    if given.write:
        page = given.write.read_text(encoding="utf-8")
        mark = re.compile(r"(<!-- bench/dynamics\.py -->\n).*?(\n<!-- end -->)", re.DOTALL)
        given.write.write_text(mark.sub(lambda m: m[1] + found + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
