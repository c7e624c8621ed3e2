"""What the terminal and the run directory see of a training: a progress bar and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from retain.results import append, write_text


def bar(**options: Any) -> Progress:
    """The progress bar used everywhere: what, how far, how much longer."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        **options,
    )


class Record(TrainerCallback):
    """Appends every log line of a training to `metrics.jsonl`, one JSON object a line."""

    def __init__(self, path: Path, task: str) -> None:
        self.path, self.task = path, task

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            forget_after(self.path, self.task, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            append(self.path, {"kind": "step", "task": self.task, "step": state.global_step, **logs})


class Bar(TrainerCallback):
    """A progress bar over optimizer steps, with the latest loss."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress = bar(transient=True)
            self.progress.start()
            self.job = self.progress.add_task(self.label, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.job, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.progress is not None and logs and "loss" in logs:
            self.progress.update(self.job, note=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; also after an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def forget_after(path: Path, task: str, step: int) -> None:
    """Drop a task's records beyond a step: they are made again when a run continues from a checkpoint."""
    forget(path, lambda r: r.get("kind") == "step" and r.get("task") == task and r.get("step", 0) > step)


def forget_looks(path: Path, stage: str, probes: set[str]) -> None:
    """Drop a stage's looks at some probes: they are made again."""
    forget(path, lambda r: r.get("kind") == "look" and r.get("stage") == stage and r.get("probe") in probes)


def forget(path: Path, unwanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON Lines file without the unwanted records and without half lines, whole or not at all."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line of a run that was killed
        if not unwanted(record):
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))
