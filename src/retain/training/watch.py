"""What the terminal and the run directory see of a training: a progress bar and `metrics.jsonl`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


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


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one record to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")


def forget_after(path: Path, task: str, step: int) -> None:
    """Drop a task's records beyond a step: they are made again when a run continues from a checkpoint."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line of a run that was killed
        if not (record.get("kind") == "step" and record.get("task") == task and record.get("step", 0) > step):
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
