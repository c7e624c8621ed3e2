"""Rows of two origins on their way to the model: counted, collated and streamed with their origin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retain.errors import ConfigError

if TYPE_CHECKING:
    from retain.data.mixture import Mixture


class SourceCollator:
    """Keeps each row's origin (0 new, from 1 sources of replay), and its number if any, beside what `inner` makes."""

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


def realised(replayed: dict[str, int], rows: int) -> str:
    """What was replayed, in words."""
    number = sum(replayed.values())
    each = f": {', '.join(f'{name} {count}' for name, count in replayed.items())}" if len(replayed) > 1 else ""
    return f"{number} of {rows} rows shown were replayed ({number / max(rows, 1):.1%}){each}"


def interleaved(mixture: Mixture, seed: int) -> Any:
    """A streamed mixture, drawn by chance row by row: a stream has no end to schedule towards, and no lengths.

    Raises:
        ConfigError: a share that moves, comes in blocks or counts tokens.
    """
    from datasets import interleave_datasets

    fraction, replay, sources = mixture.fraction, mixture.replay, mixture.sources
    assert fraction is not None
    assert replay is not None
    assert sources is not None
    share = fraction(0.0)
    if any(fraction(t / 100) != share for t in range(101)):
        raise ConfigError(
            "methods.replay.schedule: a streamed data set takes a constant share only. Set `schedule: constant`."
        )
    if mixture.every is not None:
        raise ConfigError(
            f"methods.replay.every: {mixture.every} given, but a streamed data set is replayed in every step only. "
            "Remove it, or set `streaming: false`."
        )
    if mixture.by != "rows":
        raise ConfigError(
            f"methods.replay.by: {mixture.by} given, but of a streamed data set only rows are counted. "
            "Set `by: rows`, or `streaming: false`."
        )
    shares = sources.shares(np.ones(len(replay)))
    streams = [mixture.new.map(lambda row: {**row, "source": 0})]
    for number in range(len(shares)):
        rows = replay.select(np.flatnonzero(sources.origin == number)).shuffle(seed=seed).to_iterable_dataset()
        streams.append(rows.map(lambda row, number=number: {**row, "source": number + 1}).repeat(None))
    return interleave_datasets(streams, probabilities=[1 - share, *(share * shares)], seed=seed)
