"""Rows of two origins on their way to the model: counted, collated and streamed with their origin."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from retain.errors import ConfigError


class SourceCollator:
    """Keeps each row's origin (0 new, 1 replay), and its number where there is one, beside what `inner` makes."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        own = ("source", "number")
        batch = self.inner([{k: v for k, v in example.items() if k not in own} for example in examples])
        batch["source"] = torch.tensor([int(example.get("source", 0)) for example in examples])
        if examples and "number" in examples[0]:
            batch["number"] = torch.tensor([int(example["number"]) for example in examples])
        return batch


def length(rows: Any, default: int) -> int:
    return len(rows) if hasattr(rows, "__len__") else default


def supervised(rows: Any, by: str) -> np.ndarray:
    if by == "rows":
        return np.ones(len(rows), dtype=np.int64)
    return np.array([sum(label != -100 for label in labels) for labels in rows["labels"]], dtype=np.int64)


def interleaved(new: Any, replay: Any, fraction: Any, seed: int) -> Any:
    """A streamed mixture; the share is constant because a stream has no end to schedule towards."""
    from datasets import interleave_datasets

    share = fraction(0.0)
    if fraction(1.0) != share:
        raise ConfigError(
            "methods.replay.schedule: a streamed data set takes a constant share only. Set `schedule: constant`."
        )
    new = new.map(lambda row: {**row, "source": 0})
    old = replay.to_iterable_dataset().map(lambda row: {**row, "source": 1}).repeat(None)
    return interleave_datasets([new, old], probabilities=[1 - share, share], seed=seed)
