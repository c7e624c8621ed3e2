"""One thing to learn: rows to train on, rows to test on, and notes on what was done to them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retain.data.chat import On, batch_lengths, long_note, prompt_text, row_form, row_lengths, to_chat
from retain.data.sources import has_split, load_rows, locate
from retain.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

#: Keys of a task in a mapping: the settings of `load_task` that concern its data.
SETTINGS = (
    *("data", "name", "test", "on", "columns", "limit", "test_limit", "hold_out", "hold_out_at_most"),
    *("streaming", "list_choices", "long", "only"),
)
#: Rows of a stream that are measured at once.
STREAMED = 100


@dataclass(frozen=True)
class Task:
    """What one step of a run learns.

    Args:
        name: short name, used for folders and tables.
        rows: training rows in one of TRL's forms (`retain.data.chat.to_chat`).
        test_rows: rows as they were read, for probes; empty when nothing was held out.
        form: `messages`, `response`, `choices` or `text`.
        source: file, folder or hub id of the training rows.
        notes: what was done to the rows, one sentence each, for printing and for the report.
    """

    name: str
    rows: Dataset | IterableDataset
    test_rows: list[dict[str, Any]]
    form: str
    source: str
    notes: list[str] = field(default_factory=list)


def load_task(
    spec: str | Path | Mapping[str, Any],
    *,
    name: str | None = None,
    test: str | Path | None = None,
    on: On = "completion",
    hold_out: float = 0.1,
    hold_out_at_most: int = 200,
    limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    streaming: bool = False,
    list_choices: bool = True,
    tokenizer: Any = None,
    max_length: int | None = None,
    long: str = "cut",
    only: dict[str, list[Any]] | None = None,
) -> Task:
    """Read one task.

    Test rows come from `test`, else from the folder's test (or dev) file, else from the training rows, of
    which a seeded share is then held out. A prompt is never in both: such rows leave the training rows.

    Args:
        spec: file, folder or hub id; or a mapping with the key `data` and any of the settings below that
            concern the data.
        name: default: the name of the file or folder.
        test: where the test rows are; "same" asks the training rows themselves, for facts to be remembered.
        on: what is trained on, see `to_chat`.
        hold_out: share of the rows that is held out when there is no test file, of texts two at least; 0 for none.
        hold_out_at_most: rows.
        limit: at most this many rows are read for training, drawn with `seed`.
        test_limit: the same for test; no more than this are held out either.
        columns: our name → name in the source.
        streaming: see `load_rows`; nothing is counted then.
        list_choices: see `to_chat`.
        tokenizer, max_length: when both are given, rows longer than `max_length` tokens are counted (not in a stream).
        only: column in the source → its values in the rows that are wanted, for training and test.
        long: "cut" leaves long rows to the trainer, which cuts their end; "drop" leaves them out, those of a stream as
            they come, and needs `tokenizer` and `max_length`.

    Raises:
        ConfigError: an unknown setting, or one that is impossible.
        DataError: see `load_rows` and `to_chat`; or no training row is left.
    """
    if isinstance(spec, Mapping):
        return _from_mapping(spec, seed=seed, tokenizer=tokenizer, max_length=max_length)
    if not 0 <= hold_out < 1:
        raise ConfigError(f"hold_out: {hold_out} given. Allowed: 0 (none) up to, not including, 1.")
    if hold_out_at_most < 1:
        raise ConfigError(f"hold_out_at_most: {hold_out_at_most} given. Allowed: 1 or more; for none, hold_out: 0.")
    if long not in ("cut", "drop"):
        raise ConfigError(unknown("long", long, ("cut", "drop")))
    if long == "drop" and (tokenizer is None or max_length is None):
        raise ConfigError(
            "long: 'drop' has no effect without a longest length and a tokenizer. Set `train.max_length` (in Python "
            "max_length and tokenizer), or long: cut."
        )
    path = locate(spec, "train")
    label = str(path or spec)
    rows = load_rows(spec, "train", streaming, limit, seed, columns, only)
    form = row_form(rows.column_names or list(next(iter(rows))), label)
    notes: list[str] = []
    most = min(hold_out_at_most, test_limit or hold_out_at_most)
    if test == "same":
        test_rows = _recalled(rows, most, seed, streaming, notes)
    else:
        test_rows = _test_rows(spec, test, test_limit, seed, columns, only, notes)
    if not test_rows and hold_out > 0:
        least = 2 if form == "text" else 1  # of documents one alone says nothing about others
        rows, test_rows = _hold_out(rows, hold_out, most, least, seed, streaming, label, notes)
    if not test_rows:
        notes.append("no test rows: what this task gains cannot be measured")
    if test != "same":
        rows = _apart(rows, test_rows, form, streaming, label, notes)
    chat = to_chat(rows, label, on, list_choices)
    if tokenizer is not None and max_length is not None:
        fit = _fit_stream if streaming else _fit
        chat = fit(chat, tokenizer, max_length, long, label, notes)
    return Task(name or _short(spec, path), chat, test_rows, form, str(spec), notes)


def _from_mapping(spec: Mapping[str, Any], **rest: Any) -> Task:
    for key in spec:
        if key not in SETTINGS:
            raise ConfigError(unknown("task", str(key), SETTINGS))
    if "data" not in spec:
        raise ConfigError(f"task: 'data' is missing; a file, a folder or a hub id. Given: {', '.join(spec)}.")
    return load_task(spec["data"], **{key: value for key, value in spec.items() if key != "data"}, **rest)


def _short(spec: str | Path, path: Path | None) -> str:
    """The folder's name for `…/poems/train.jsonl`, the file's own name for `…/poems.jsonl`."""
    if path is None:
        return str(spec).split(":")[0].rsplit("/", 1)[-1]
    stem = path.name.split(".")[0]
    return path.resolve().parent.name if stem in ("train", "training") else stem


def _test_rows(
    spec: str | Path,
    test: str | Path | None,
    limit: int | None,
    seed: int,
    columns: dict[str, str] | None,
    only: dict[str, list[Any]] | None,
    notes: list[str],
) -> list[dict[str, Any]]:
    split = "test"
    if test is None:
        split = next((name for name in ("test", "dev") if has_split(spec, name)), "")
        if not split:
            return []
    elif Path(test).is_dir() and not has_split(test, "test") and has_split(test, "dev"):
        split = "dev"
    where = spec if test is None else test
    rows = load_rows(where, split, limit=limit, seed=seed, columns=columns, only=only)
    label = str(locate(where, split) or where)
    notes.append(f"{len(rows)} test rows from {label}")
    return rows.to_list()


def _recalled(rows: Any, most: int, seed: int, streaming: bool, notes: list[str]) -> list[dict[str, Any]]:
    if streaming:
        raise ConfigError("test: 'same' with a stream, whose rows are not known before. Give a test file.")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])
    notes.append(f"{len(chosen)} of the {len(rows)} training rows are asked again: what is measured is memory")
    return rows.select(chosen).to_list()


def _hold_out(
    rows: Any, share: float, most: int, least: int, seed: int, streaming: bool, label: str, notes: list[str]
) -> tuple[Any, list[dict[str, Any]]]:
    if streaming:
        notes.append(f"no test file: the first {most} rows of {label} are kept for testing")
        return rows.skip(most), list(rows.take(most))
    number = min(most, max(min(least, len(rows) - 1), 1, round(share * len(rows))))
    if number >= len(rows):
        raise DataError(f"{label}: {len(rows)} row(s), too few to hold one out. Give a test file, or hold_out: 0.")
    order = np.random.default_rng(seed).permutation(len(rows))
    notes.append(f"no test file: {number} of {len(rows)} rows held out for testing (seed {seed})")
    return rows.select(np.sort(order[number:])), rows.select(np.sort(order[:number])).to_list()


def _apart(rows: Any, test_rows: list[dict[str, Any]], form: str, streaming: bool, label: str, notes: list[str]) -> Any:
    """Training rows without those whose prompt is tested."""
    tested = {_digest(prompt_text(row, asked_as(list(row)))) for row in test_rows if asked_as(list(row))}
    if not tested:
        return rows
    if streaming:
        notes.append("training rows with a prompt that is tested are dropped as they come")
        return rows.filter(lambda row: _digest(prompt_text(row, form)) not in tested)
    keep = [number for number, row in enumerate(rows) if _digest(prompt_text(row, form)) not in tested]
    dropped = len(rows) - len(keep)
    if not keep:
        raise DataError(f"{label}: every prompt is also in the test rows, so nothing is left to train on.")
    if dropped:
        notes.append(f"{dropped} of {len(rows)} training rows dropped: their prompt is in the test rows")
        return rows.select(keep)
    return rows


def asked_as(columns: list[str]) -> str:
    """The form whose prompt these columns hold, or "" for none; test rows need no response to have one."""
    if "messages" in columns:
        return "messages"
    if "prompt" in columns:
        return "response"
    if {"question", "choices"} <= set(columns):
        return "choices"
    return "text" if "text" in columns else ""


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _fit(chat: Any, tokenizer: Any, max_length: int, long: str, label: str, notes: list[str]) -> Any:
    lengths = row_lengths(chat, tokenizer)
    too_long = int((lengths > max_length).sum())
    if not too_long:
        return chat
    if long == "drop" and too_long == len(lengths):
        raise DataError(f"{label}: all {too_long} rows are longer than max_length {max_length} tokens. Raise it.")
    notes.append(long_note(too_long, len(lengths), max_length, left_out=long == "drop"))
    return chat.select(np.flatnonzero(lengths <= max_length)) if long == "drop" else chat


def _fit_stream(chat: Any, tokenizer: Any, max_length: int, long: str, label: str, notes: list[str]) -> Any:
    if long != "drop":
        return chat
    notes.append(f"rows of the stream that are longer than {max_length} tokens are left out as they come")

    def fits(batch: dict[str, list[Any]]) -> list[bool]:
        return (batch_lengths(batch, tokenizer) <= max_length).tolist()

    kept = chat.filter(fits, batched=True, batch_size=STREAMED)
    if next(iter(kept), None) is None:
        raise DataError(f"{label}: all rows are longer than max_length {max_length} tokens. Raise it.")
    return kept
