"""What a model has seen: rows of a run's tasks, of its buffer, and of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retain.advice.reading import Sample, read_sample, sample_of
from retain.config import ModelConfig
from retain.errors import DataError, RunError
from retain.rundir import RunDirectory, stage_name


def is_run(where: str) -> bool:
    """Whether a path is a run directory."""
    return RunDirectory(where).config.is_file()


def samples(where: str, most: int | None = None, seed: int = 0) -> list[Sample]:
    """Rows of one source, or of every task of a run, at most `most` of each.

    A run's tasks are read again where they were; rows of its buffer stand for a task whose data is gone.

    Raises:
        DataError: no rows are there any more, or as `read_sample`.
    """
    if not is_run(where):
        return [read_sample(where, most, seed)]
    from retain.data.tasks import load_task

    config = RunDirectory(where).read_config()
    found, gone = [], []
    for name, entry in zip(config.task_names, config.tasks):
        try:
            task = load_task(entry.model_dump(exclude_none=True) | {"name": name}, seed=config.seed)
        except DataError as error:
            gone.append(str(error))
            continue
        found.append(sample_of(task.rows, f"task {name}", most, seed))
    if gone:
        kept = buffered(Path(where))
        if kept is None and not found:
            raise DataError(f"{where}: the rows of its tasks are not there any more, and no buffer: {gone[0]}")
        if kept is not None:
            found.append(sample_of(kept, f"buffer of {where}", most, seed))
    return found


def buffered(run: Path) -> Any | None:
    """Rows of earlier tasks in a run's buffer, in chat form; None when it keeps none."""
    from retain.data.buffer import Buffer

    for path in sorted((run / "buffer").glob("tasks*/state.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        rows = Buffer(path.parent, state["size"], state["policy"], state["seed"]).rows()
        if len(rows):
            return rows
    return None


def model_of(seen: list[str], model: str | None) -> tuple[Any, Any]:
    """(model, tokenizer): the one given, else that of the first run after its last finished task, else the starter.

    Raises:
        RunError, ModelError: it cannot be loaded.
    """
    import torch

    from retain.config import STARTER
    from retain.models.load import load_model, load_stage, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"

    run = next((where for where in seen if is_run(where)), None)
    if model is not None or run is None:
        found, tokenizer = load_model(ModelConfig(name=model or STARTER))
        return found.to(device), tokenizer
    place = RunDirectory(run)
    config = place.read_config()
    stages = [stage_name(i, name) for i, name in enumerate(config.task_names, 1)]
    done = [stage for stage in stages if place.done(stage) is not None]
    if not done:
        raise RunError(f"{run}: no task of it is finished. Finish the run, or give --model.")
    folders = [place.task(stage) for stage in done]
    return load_stage(config.model, folders, device=device), load_tokenizer(config.model.name, config.model.revision)
