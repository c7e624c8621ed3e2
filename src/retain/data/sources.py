"""Rows from a file, a folder or the hub, checked while they are read.

A source is a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, each text form also as `.gz`), a folder
with one such file per split (`train.jsonl`, `test.csv`, …), or a hub id
(`owner/name`, or `owner/name:config`).
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.data.json_rows import open_text, quiet, read_json, suffix_of
from retain.errors import DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
#: Names under which a split is found in a folder or on the hub, tried in this order.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "dev": ("dev", "validation", "valid", "val", "eval"),
}
_LISTS = ("choices", "messages", "answers", "options")  # CSV cells that may hold a list


def load_rows(
    where: str | Path,
    split: str = "train",
    streaming: bool = False,
    limit: int | None = None,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    only: dict[str, list[Any]] | None = None,
) -> Dataset | IterableDataset:
    """Read rows as they are, without giving them a form (`retain.data.chat.to_chat` does that).

    Args:
        where: a file, a folder with one file per split, or a hub id.
        split: which split of a folder or hub id; `dev`, `validation`, `valid`, `val` and `eval` are the same.
            Ignored for a file.
        streaming: read row by row and keep nothing, for what does not fit on disk or in memory.
        limit: at most this many rows, drawn with `seed` and kept in their order; when streaming, the first
            rows of a shuffle over a window of 10,000.
        seed: of the draw.
        columns: our name → name in the source, such as `{"prompt": "instruction", "response": "output"}`.
        only: column in the source → its values in the rows that are wanted.

    Raises:
        DataError: nothing there, unreadable, malformed (with file and line), empty, or a column is missing.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{where}: limit is {limit}; at least 1 row is needed. Leave it out to read every row.")
    path = locate(where, split)
    if path is None:
        rows = _from_hub(str(where), split, streaming)
    elif suffix_of(path) in (".jsonl", ".json"):
        rows = read_json(path, streaming)
    else:
        rows = _from_table(path, streaming)
    label = str(path or where)
    first = _first(rows, label)
    if only:
        rows = _only(rows, list(first), only, label)
    if columns:
        rows = _rename(rows, list(first), columns, label)
    if limit is None:
        return rows
    if streaming:
        return rows.shuffle(seed=seed, buffer_size=10_000).take(limit)
    if limit < len(rows):
        import numpy as np

        rows = rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit]))
    return rows


def _only(rows: Any, names: list[str], only: dict[str, list[Any]], label: str) -> Any:
    for column, values in only.items():
        if column not in names:
            raise DataError(unknown(f"{label}: only", column, names))
        rows = rows.filter(lambda value, values=values: value in values, input_columns=[column])
    if next(iter(rows), None) is None:
        shown = " and ".join(f"{column} in {values}" for column, values in only.items())
        raise DataError(f"{label}: no row has {shown}. Give other values.")
    return rows


def load_texts(where: str | Path) -> Dataset:
    """Plain texts, in one column `text`: from a `.txt` file, whose texts stand between empty lines, or any rows that
    have this column.

    Raises:
        DataError: as `load_rows`; rows of another form; no text in the file.
    """
    from datasets import Dataset

    path = Path(where).expanduser()
    if path.is_file() and path.suffix == ".txt":
        try:
            parts = re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Save it as UTF-8 text.") from error
        texts = [part.strip() for part in parts if part.strip()]
    else:
        rows = load_rows(where)
        if "text" not in rows.column_names:
            raise DataError(
                f"{where}: columns {', '.join(rows.column_names)}; plain texts need a column 'text'. "
                "Rename one, or give a .txt file."
            )
        texts = [text for text in rows["text"] if isinstance(text, str) and text.strip()]
    if not texts:
        raise DataError(f"{where}: no text in it. Give at least one.")
    return Dataset.from_dict({"text": texts})


def locate(where: str | Path, split: str = "train") -> Path | None:
    """The file that holds a split, or None when `where` is a hub id.

    Raises:
        DataError: the path does not exist, is no file that can be read, or the folder lacks the split.
    """
    path = Path(where).expanduser()
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise DataError(f"{path}: files ending in '{path.suffix}' are not read. Allowed: {', '.join(SUFFIXES)}.")
        return path
    if path.is_dir():
        return _in_folder(path, split)
    if _looks_like_hub_id(str(where)):
        return None
    raise DataError(f"{path}: no such file or folder. {_what_is_there(path)}")


def has_split(where: str | Path, split: str) -> bool:
    """Whether a folder holds a split; False for a file and for a hub id (asking would need the net)."""
    path = Path(where).expanduser()
    return path.is_dir() and _match(path, split) is not None


# ---------------------------------------------------------------------------------------------- finding files


def _aliases(split: str) -> tuple[str, ...]:
    return next((names for names in SPLITS.values() if split in names), (split,))


def _match(folder: Path, split: str) -> Path | None:
    for name in (split, *_aliases(split)):
        for suffix in SUFFIXES:
            for ending in (suffix, suffix + ".gz"):
                if (folder / (name + ending)).is_file():
                    return folder / (name + ending)
    return None


def _in_folder(folder: Path, split: str) -> Path:
    found = _match(folder, split)
    if found is None:
        raise DataError(f"{folder}: no file for '{split}', such as {split}.jsonl. {_what_is_there(folder / split)}")
    return found


def _what_is_there(path: Path) -> str:
    """What the nearest existing folder holds, so that the right name is in the message."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        path, folder = folder, folder.parent
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean '{folder / near[0]}'? " if near else ""
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    return f"{hint}In {folder}: {listed}."


def _looks_like_hub_id(where: str) -> bool:
    name = where.split(":")[0]
    if where.startswith((".", "/", "~")) or "\\" in where or name.count("/") > 1 or not name:
        return False
    return suffix_of(Path(name)) not in (*SUFFIXES, ".gz", ".txt") and not ("/" in name and Path(name).parent.is_dir())


# -------------------------------------------------------------------------------------- CSV, Parquet, the hub


def _from_table(path: Path, streaming: bool) -> Dataset | IterableDataset:
    import datasets

    options: dict[str, Any] = {"data_files": str(path), "split": "train", "streaming": streaming}
    kind = "parquet" if suffix_of(path) == ".parquet" else "csv"
    names: list[str] = []
    if kind == "csv":
        separator = "\t" if suffix_of(path) == ".tsv" else ","
        names = _header(path, separator)
        # Every cell is text as written: "NA", "007" and "1e5" are answers, not nulls and numbers.
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options |= {"features": features, "keep_default_na": False, "sep": separator}
    with quiet():
        rows = _guarded(lambda: datasets.load_dataset(kind, **options), f"{path}: cannot be read as {kind.upper()}")
        lists = [name for name in names if name in _LISTS]
        return _lists(rows, lists, path) if lists else rows


def _header(path: Path, separator: str) -> list[str]:
    try:
        with open_text(path) as file:
            names = next(csv.reader(file, delimiter=separator), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Save it as UTF-8 text.") from error
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}, line 1: a header with different column names is needed; found {names or 'nothing'}.")
    return names


def _lists(rows: Any, names: list[str], path: Path) -> Any:
    """Turn CSV cells that hold a list, as JSON (`["a", "b"]`) or as `a|b`, into lists."""
    from datasets import Json

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        out = {}
        for name in names:
            cell = (row[name] or "").strip()
            try:
                out[name] = json.loads(cell) if cell.startswith("[") else [part.strip() for part in cell.split("|")]
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, row {number + 1}, '{name}': not a JSON list ({error.msg}).") from error
        return out

    features = rows.features.copy()
    features.update({name: Json() for name in names})
    return rows.map(convert, with_indices=True, features=features)


def _from_hub(where: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    import datasets

    name, _, config = where.partition(":")
    message = (
        f"{where}: no such local path, and the hub did not give its split '{split}'. Check the id "
        "(owner/name or owner/name:config), the net and HF_HUB_OFFLINE, or give a local file"
    )

    def read() -> Any:
        names = list(dict.fromkeys((split, *_aliases(split))))
        for alias in names:
            try:
                return datasets.load_dataset(name, config or None, split=alias, streaming=streaming)
            except ValueError as error:
                if alias == names[-1] or "split" not in str(error).lower():
                    raise
        return None

    with quiet():
        return _guarded(read, message)


def _guarded(read: Callable[[], Any], message: str) -> Any:
    """Turn whatever a reader raises into one line."""
    try:
        return read()
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        if "corresponds to no data" in str(cause):  # what `datasets` says of a table without rows
            raise DataError(f"{message.partition(': ')[0]}: no rows. Give at least one.") from error
        reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
        raise DataError(f"{message} ({reason.rstrip('.')}).") from error


def _first(rows: Any, label: str) -> dict[str, Any]:
    first = _guarded(lambda: next(iter(rows), None), f"{label}: cannot be read")
    if first is None:
        raise DataError(f"{label}: no rows. Give at least one.")
    return first


def _rename(rows: Any, names: list[str], columns: dict[str, str], label: str) -> Any:
    missing = [theirs for theirs in columns.values() if theirs not in names]
    if missing:
        raise DataError(f"{label}: no column '{missing[0]}'. Found: {', '.join(names)}.")
    moved = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    if len(moved) < len([1 for ours, theirs in columns.items() if ours != theirs]):
        raise DataError(f"{label}: one column cannot stand for two. Given: {columns}.")
    covered = [ours for ours in moved.values() if ours in names and ours not in moved]
    return rows.remove_columns(covered).rename_columns(moved) if covered else rows.rename_columns(moved)
