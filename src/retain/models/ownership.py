"""Owners of weights in a run directory: written after each task, and used to take one task's model out of the last.

`owners/02.safetensors` holds a byte for every weight that tasks share among them: the task that keeps it, 0 for none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from retain.errors import RunError
from retain.functional.ownership import of_task
from retain.models import adapters, params

FOLDER = "owners"


def keep(owners: params.Tensors, run: Path, task: int) -> None:
    """Write who owns what after a task."""
    adapters.keep(owners, run / FOLDER, task)


def kept(run: Path, task: int) -> params.Tensors:
    """Who owns what after a task; nobody anything before the first.

    Raises:
        RunError: that task left no owners, or the file is damaged.
    """
    return adapters.kept(run / FOLDER, task) if task else {}


@torch.no_grad()
def select(model: Any, base: Any, run: Path, task: int, last: int) -> Any:
    """The model as it was right after a task, bit for bit, out of the model after a later one; changed in place.

    Args:
        model: after task number `last`.
        base: before the first task.
        run: the run directory.
        task: number of the task, at most `last`.

    Raises:
        RunError: the tasks of this run do not keep their weights apart.
    """
    if not (run / FOLDER).is_dir():
        raise RunError(
            f"{run}: its tasks share all weights, so one cannot be taken out of a later model. Give the task's stage, "
            "or train with `packnet`."
        )
    before = dict(params.causal(base).named_parameters())
    weights = dict(params.causal(model).named_parameters())
    for name, owner in kept(run, last).items():
        weight = weights[name]
        weight.copy_(of_task(weight, before[name].to(weight), owner.to(weight.device), task))
    return model
