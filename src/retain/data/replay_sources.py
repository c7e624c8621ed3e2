"""Where replayed rows come from: files, folders, the hub, the user's old rows, the model itself, earlier tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, Field, model_validator

from retain.data.chat import row_form, to_chat
from retain.data.sources import load_rows
from retain.errors import ConfigError
from retain.functional.sources import Sources

#: Sources that are not files: the run's `old` rows, rows of earlier tasks, rows that the model writes.
OWN = ("old", "tasks", "self", "demonstrations", "on_policy")
#: Rows kept of a stream when no limit is given.
STREAMED = 10_000
#: Rows of a reservoir whose folder has no number in its name; the usual one.
SHARED = 10_000


class SourceConfig(BaseModel):
    """One source of replay rows; a plain string is its `data`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str
    """File (JSONL, CSV, Parquet), folder with a train file, hub id; or `old`, `self`, `tasks`."""
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """How much of the replay comes from here, against the other weights."""
    name: str | None = None
    """Short name for the log; made from the data when not given."""
    limit: int | None = Field(None, ge=1)
    """At most this many rows, drawn with the seed."""
    columns: dict[str, str] | None = None
    """Our column name → the name in the data."""
    streaming: bool = False
    """Read row by row and keep `limit` rows (10,000 when not given); for data that does not fit."""

    @model_validator(mode="before")
    @classmethod
    def _string(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) else value


def shared_folder(buffer: Path, size: int) -> Path:
    """Folder of a reservoir of `size` rows of earlier tasks in the run's buffer; methods that keep as many share it."""
    return buffer / ("tasks" if size == SHARED else f"tasks-{size}")


@dataclass
class Part:
    """Rows of one source, in one of the trainer's forms."""

    name: str
    rows: Any


def names(sources: Sequence[SourceConfig]) -> list[str]:
    """A name for every source; a repeated one gets a number."""
    found: list[str] = []
    for source in sources:
        path = Path(source.data)
        plain = path.name.split(".")[0].split(":")[0]
        name = base = source.name or (path.parent.name if plain in ("train", "training") else plain) or "source"
        number = 2
        while name in found:
            name, number = f"{base}-{number}", number + 1
        found.append(name)
    return found


def check_settings(config: Any) -> None:
    """Refuse settings of `replay` that would have no effect.

    Raises:
        ConfigError: the first of them, with what to do.
    """
    listed = [source.data for source in config.sources]
    given = config.model_fields_set
    shared = config.temperature is not None or any(source.weight for source in config.sources)
    keeps = config.buffer and (not listed or "tasks" in listed)
    taken = [source for source in config.sources if source.data in ("old", "self") and source.limit is None]
    writes = "self" in listed if listed else config.source not in ("old", "none")
    idle = {
        "source": (listed and config.source != "auto", "name it among the `sources`"),
        "temperature": (config.temperature is not None and len(listed) < 2, "give two or more `sources`"),
        "spread": (config.spread and not config.every, "set `every`"),
        "priority": (config.priority != "none" and shared, "a draw by worth has no weights: remove those of `sources`"),
        "buffer": (not config.buffer and "tasks" in listed, "keep rows for the source `tasks`"),
        "policy": ("policy" in given and not keeps, "keep rows of earlier tasks (`buffer`, `tasks` in `sources`)"),
        "rows": ("rows" in given and listed and not taken, "add `old` or `self`, without a `limit`, to the `sources`"),
        "max_tokens": ("max_tokens" in given and not writes, "let the model write rows, such as with `self`"),
    }
    if "buffer" in given and config.buffer and listed and "tasks" not in listed:
        idle["buffer"] = (True, "add `tasks` to the `sources`")
    if config.source == "none" and not listed:
        idle["rows"] = ("rows" in given, "choose another `source`")
        idle["source"] = (not config.buffer, "keep rows of earlier tasks in the `buffer`")
    for key, (without_effect, advice) in idle.items():
        if without_effect:
            value = getattr(config, key)
            raise ConfigError(f"methods.replay.{key}: {value} has no effect here; {advice}, or remove it.")
    for number, source in enumerate(config.sources):
        where = f"methods.replay.sources.{number}"
        if source.data in ("demonstrations", "on_policy"):
            raise ConfigError(f"{where}: '{source.data}' is not one among others; set `source: {source.data}` instead.")
        if source.data not in OWN:
            continue
        if source.columns or source.streaming:
            raise ConfigError(f"{where}: `columns` and `streaming` have no effect on '{source.data}'. Remove them.")
        if listed.count(source.data) > 1:
            raise ConfigError(f"{where}: '{source.data}' is listed twice. Keep one, with the sum of the weights.")


def check_rows(source: SourceConfig) -> None:
    """Look at the first row of a source, so that a run does not find out late.

    Raises:
        DataError: not there, unreadable, or rows that cannot be trained on.
    """
    if source.data not in OWN:
        first = next(iter(load_rows(source.data, "train", streaming=True, columns=source.columns)))
        row_form(list(first), source.data)


def read(source: SourceConfig, seed: int) -> Any:
    """The rows of a file, folder or hub id, in chat form.

    Raises:
        DataError: as `load_rows` and `to_chat`.
    """
    limit = source.limit or (STREAMED if source.streaming else None)
    rows = load_rows(source.data, "train", source.streaming, limit, seed, source.columns)
    if source.streaming:
        from datasets import Dataset

        rows = Dataset.from_list(list(rows))
    return to_chat(rows, source.data)


def some(rows: Any | None, limit: int | None, seed: int) -> Any:
    """At most `limit` rows, drawn with `seed`, in their order."""
    if rows is None or limit is None or limit >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit]))


def gather(listed: Sequence[SourceConfig], seed: int, own: Callable[[SourceConfig], Any | None]) -> list[Part]:
    """The rows of every source that has any.

    Args:
        listed: the sources, in order.
        seed: of the rows that are taken where there is a limit.
        own: gives the rows of a source that is no file.
    """
    parts = []
    for source, name in zip(listed, names(listed)):
        if source.data in OWN:
            rows = own(source)
        else:
            with PartialState().main_process_first():  # one process fills the caches
                rows = read(source, seed)
        if rows is not None and len(rows):
            parts.append(Part(name, rows))
    return parts


def weighted(parts: Sequence[Part], config: Any) -> tuple[tuple[float, ...], float]:
    """(weights of the parts, temperature): as the user gave them; weights alone count without sizes.

    Without `sources` every row counts alike, but rows of earlier tasks give a quarter at most: they must not drown
    what stands for abilities from before.
    """
    if not config.sources:
        before = sum(len(part.rows) for part in parts if part.name != "tasks")
        most = {part.name: before / (3 * len(part.rows)) for part in parts if part.name == "tasks" and before}
        return tuple(min(1.0, most.get(part.name, 1.0)) for part in parts), 1.0
    weight = dict(zip(names(config.sources), (source.weight for source in config.sources)))
    temperature = config.temperature or (math.inf if any(weight.values()) else 1.0)
    return tuple(weight[part.name] or 1.0 for part in parts), temperature


def joined_parts(
    parts: Sequence[Part], weights: Sequence[float], temperature: float
) -> tuple[Any | None, Sources | None]:
    """One data set of all parts with the columns they share, and where each of its rows is from.

    Args:
        parts: tokenised; those without rows are left out.
    """
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if len(part.rows)]
    rows = joined([part.rows for part, _ in kept])
    if rows is None:
        return None, None
    origin = np.repeat(np.arange(len(kept)), [len(part.rows) for part, _ in kept])
    return rows, Sources(tuple(part.name for part, _ in kept), origin, tuple(w for _, w in kept), temperature)


def joined(parts: list[Any]) -> Any | None:
    """One data set of tokenised parts, with the columns they share."""
    from datasets import concatenate_datasets

    if not parts:
        return None
    common = [c for c in parts[0].column_names if all(c in p.column_names for p in parts)]
    return concatenate_datasets([p.select_columns(common) for p in parts])
