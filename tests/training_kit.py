"""Training runs of a tiny model in a fraction of a second, and what tests ask of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tiny import tiny_model, tiny_tokenizer
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from retain.methods.base import Method, Stack
from retain.methods.context import Run
from retain.models import params
from retain.training.on_policy import ContinualSDFTTrainer, sdft_arguments
from retain.training.trainer import ContinualTrainer

disable_progress_bars()

#: Whether trainings run on the GPU that is there; see the Makefile's `test-gpu`.
ON_GPU = os.environ.get("RETAIN_TESTS_ON") == "gpu"
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven"]


def rows(count: int, offset: int = 0) -> Dataset:
    """Chat rows whose answers differ in length, so that micro-batches differ in supervised tokens."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"question {i + offset}"}],
                "completion": [{"role": "assistant", "content": " ".join(NUMBERS[: 1 + (3 * i + offset) % 7])}],
            }
            for i in range(count)
        ]
    )


#: Settings by which the same rows come one per row, flattened into one row per batch, or packed.
LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {},
    "flattened": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 96},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 96},
}


def texts(count: int = 6) -> Dataset:
    """Rows of plain text, every token of which is learned."""
    return Dataset.from_list([{"text": " ".join(NUMBERS[: 1 + (3 * i) % 7]) + f" ships {i}"} for i in range(count)])


def other_rows(count: int = 12) -> Dataset:
    """Old rows that the new ones say nothing about."""
    words = ["sea", "cold", "ships", "land"]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{i} tell"}],
                "completion": [{"role": "assistant", "content": " ".join(words[i % 3 :])}],
            }
            for i in range(count)
        ]
    )


class Spy(ContinualTrainer):
    """Remembers the rows of every micro-batch: token ids, supervised tokens and origin."""

    keeps_loss = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        source = inputs.get("source")
        self.seen.append(
            {
                "ids": inputs["input_ids"].tolist(),
                "labels": inputs["labels"].tolist(),
                "tokens": (inputs["labels"][:, 1:] != -100).sum(1).tolist(),
                "source": [0] * len(inputs["input_ids"]) if source is None else source.tolist(),
            }
        )
        return super().compute_loss(model, inputs, *args, **kwargs)


class WritingSpy(ContinualSDFTTrainer):
    """Remembers every micro-batch of a training on answers that the model writes, in the same words."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        lengths = inputs["completion_mask"].sum(1).tolist()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        self.seen.append({"ids": ids.tolist(), "tokens": lengths, "source": [0] * len(ids)})
        return super().compute_loss(model, inputs, *args, **kwargs)


class StopAt(TrainerCallback):
    """Kills a run, as an exception, when a step has ended."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


class Killed(Exception):
    """What `StopAt` raises."""


def trainer(
    methods: Sequence[Method],
    folder: Path,
    model: Any = None,
    *,
    train_rows: Any = None,
    old: Any = "default",
    steps: int = 4,
    batch: int = 4,
    run: Run | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    budget: Any = None,
    **settings: Any,
) -> Any:
    """A trainer over the tiny model: a `Spy`, or a `WritingSpy` for a method that learns from the model's own answers.

    `settings` go to `SFTConfig` or `SDFTConfig`, `old` defaults to 12 rows of its own.
    """
    options = {"learning_rate": 1e-2, "max_length": 64, "save_strategy": "no", "bf16": False, "logging_steps": 1}
    quiet = {"use_cpu": not ON_GPU, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    options |= {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": batch} | quiet | settings
    writer = Stack(methods).writer
    made = (Spy if writer is None else WritingSpy)(
        tiny_model(tiny_tokenizer()) if model is None else model,
        SFTConfig(**options) if writer is None else sdft_arguments(options, writer.fields()),
        train_dataset=rows(16) if train_rows is None else train_rows,
        processing_class=tiny_tokenizer(),
        methods=methods,
        old=rows(12, 100) if isinstance(old, str) else old,
        run=run or Run(Path(folder), say=lambda line: None),
        callbacks=list(callbacks),
        budget=budget,
    )
    made.remove_callback(PrinterCallback)
    return made


def train(methods: Sequence[Method], folder: Path, model: Any = None, **settings: Any) -> Any:
    """A finished training; arguments as in `trainer`."""
    made = trainer(methods, folder, model, **settings)
    made.train()
    return made


def merged(model: Any) -> params.Tensors:
    """The weights as they act, by name of the plain model: adapters are merged into a copy."""
    model = copy.deepcopy(model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return stored(model)


def stored(model: Any) -> params.Tensors:
    """All parameters as they are held, adapters included, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in params.causal(model).named_parameters()}


def distance(one: params.Tensors, other: params.Tensors) -> float:
    """Largest absolute difference of two sets of weights; the names must agree."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same_bits(one: params.Tensors, other: params.Tensors) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def finite(model: Any) -> bool:
    """Whether every weight is a number."""
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())
