"""A few real steps of an advised training: how much memory they take at most, and how long one takes."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from retain.config import RunConfig
from retain.data.chat import row_lengths

#: Steps that are made: the first one warms up and is not timed.
STEPS = 3
#: Seconds between two looks at the size of the process.
LOOK = 0.005


@dataclass(frozen=True)
class Trial:
    """What was measured on the longest rows of a task.

    Args:
        bytes: the most that was held: of the process on a CPU, of tensors on a GPU.
        seconds: of a step, the median of those that were timed.
        device: "cpu", "cuda", …
        rows: of a micro-batch; `width` tokens the longest of them.
    """

    bytes: int
    seconds: float
    device: str
    rows: int
    width: int


class Peak:
    """The largest resident size of this process since it was made; of a GPU what PyTorch held."""

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def peak(device: str) -> Iterator[Peak]:
    """Watch the memory while something runs."""
    import torch

    found = Peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.bytes = torch.cuda.max_memory_allocated()
        return
    done, process = threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.is_set():
            found.bytes = max(found.bytes, process.memory_info().rss)
            done.wait(LOOK)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.bytes = max(found.bytes, process.memory_info().rss)


def tried(config: RunConfig, train: dict[str, Any], model: Any, tokenizer: Any, rows: Any) -> Trial:
    """Train on the longest rows for a few steps, in a temporary folder. The model is changed: let it go afterwards.

    Rows that stand for old data are those of the task: what they say does not change what a step takes, and nothing
    needs to be written first. Importances are taken of one batch.

    Args:
        config: the advised run.
        train: its training settings, complete (`training.arguments.complete`).
        model: as `config.model` says.
        rows: of a task, in chat form.
    """
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig

    from retain.methods import build
    from retain.methods.context import Run
    from retain.training.trainer import ContinualTrainer

    together = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    lengths = row_lengths(rows, tokenizer)
    longest = np.argsort(-lengths, kind="stable")[: max(1, together)]
    chosen = rows.select(np.resize(longest, STEPS * together))
    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        own = {
            "output_dir": folder,
            "max_steps": STEPS,
            "save_strategy": "no",
            "report_to": "none",
            "seed": config.seed,
        }
        args = SFTConfig(**(train | own | {"disable_tqdm": True, "logging_steps": STEPS}))
        device = args.device.type
        run = Run(
            *(Path(folder) / "task", "trial", 1, config.seed, tokenizer, Path(folder) / "run"),
            new_rows=chosen,
            say=lambda line: None,
        )
        with peak(device) as memory:
            trainer = ContinualTrainer(
                model,
                args,
                train_dataset=chosen,
                processing_class=tokenizer,
                methods=build(_without_writing(config.methods)),
                old=chosen,
                run=run,
                callbacks=[Clock()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        trainer.release()
    steps = [end - begin for begin, end in zip(moments[::2], moments[1::2])]
    width = int(min(lengths.max(), train.get("max_length") or lengths.max()))
    return Trial(memory.bytes, statistics.median(steps[1:]), device, train["per_device_train_batch_size"], width)


def _without_writing(methods: list[Any]) -> list[Any]:
    """The same methods, with given rows in place of those that the model would write first."""
    found = []
    for entry in methods:
        name, settings = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        settings = dict(settings or {})
        if name == "replay":
            settings = {k: v for k, v in settings.items() if k != "max_tokens"} | {"source": "old"}
        if name == "der":
            settings |= {"source": "auto", "own": 0}
        if name == "ewc":
            settings["samples"] = settings.get("batch_size", 8)
        found.append({name: settings})
    return found
