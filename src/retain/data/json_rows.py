"""JSON files as rows: every mistake with its line, every value with the type it was given.

Types are worked out here rather than by a reader that guesses: a text that looks like a date stays a text,
and a column whose values differ in type (or are objects of different shape) is kept as JSON and comes back as
it was written.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.data.domains import is_set, set_rows
from retain.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

IN_MEMORY = 64 * 2**20  # bytes; a larger file is converted once into the datasets cache and memory-mapped


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars of `datasets`, which would break into ours, and put them back."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def suffix_of(path: Path) -> str:
    """The ending that says what a file holds, without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] == ".gz" and suffixes[-2] != ".parquet":
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def open_text(path: Path) -> Any:
    """Open UTF-8 text, plain or gzipped, with or without a byte order mark."""
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig")


def json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON Lines file, plain or gzipped; blank lines are skipped.

    Raises:
        DataError: a line that is not one JSON object, with its number and the reason.
    """
    path, number = Path(path), 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_line(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number + 1} or later: not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _json_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip("\r\n"))  # else a line that is cut short ends at column 1 of the next
        if "\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: not JSON ({error.msg}). One JSON object a line.") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half of a surrogate pair (\\ud…). Write the character itself.") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be a row.") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: {type(row).__name__} given, an object is needed, such as {{"prompt": …}}.')
    return row


def _json_file(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a `.json` file: a list of objects, `{"data": […]}`, a domain question set or several, or JSON Lines."""
    try:
        with open_text(path) as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects: JSON Lines under another name
            yield from json_lines(path)
            return
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    several = content if isinstance(content, list) else [content]
    if several and all(map(is_set, several)):
        wheres = [str(path) if several is not content else f"{path}, set {n}" for n in range(1, len(several) + 1)]
        content = [row for where, one in zip(wheres, several) for row in set_rows(one, where)]
    elif isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: {type(content).__name__} given, a list of objects is needed.")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: {type(row).__name__} given, an object is needed.")
        yield row


def _rows(path: str, names: tuple[str, ...] = (), changed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a JSON file, with every name in `names` filled in; `changed` only tells cached copies apart."""
    for row in _json_file(Path(path)) if suffix_of(Path(path)) == ".json" else json_lines(path):
        yield {name: row.get(name) for name in names} if names else row


def read_json(path: Path, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of a `.jsonl` or `.json` file; a stream is checked as it is read.

    Raises:
        DataError: malformed (with the line) or empty.
    """
    from datasets import Dataset, IterableDataset

    if streaming:
        return IterableDataset.from_generator(_rows, gen_kwargs={"path": str(path)})
    small = path.stat().st_size <= IN_MEMORY
    kept: list[dict[str, Any]] = []
    kinds: dict[str, str | None] = {}
    for row in _rows(str(path)):
        for name, value in row.items():
            kinds[name] = _join(kinds.get(name), _kind(value))
        if small:
            kept.append(row)
    if not kinds:
        raise DataError(f"{path}: no rows. Give at least one.")
    features = _features(kinds)
    if small:
        return Dataset.from_list([{name: row.get(name) for name in features} for row in kept], features=features)
    with quiet():
        arguments = {"path": str(path), "names": tuple(features), "changed": path.stat().st_mtime_ns}
        return Dataset.from_generator(_rows, gen_kwargs=arguments, features=features)


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float64"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        if not value:
            return "empty"
        if all(isinstance(item, str) for item in value):
            return "strings"
        if all(isinstance(item, dict) and _is_message(item) for item in value):
            return "messages"
    return "json"


def _is_message(item: dict[str, Any]) -> bool:
    return item.keys() == {"role", "content"} and all(isinstance(text, str) for text in item.values())


def _join(one: str | None, other: str | None) -> str | None:
    if one is None or other is None or one == other:
        return one if other is None else other
    pair = {one, other}
    if pair == {"int64", "float64"}:
        return "float64"
    if "empty" in pair and pair & {"strings", "messages"}:
        return (pair - {"empty"}).pop()
    return "json"


def _features(kinds: dict[str, str | None]) -> Features:
    from datasets import Features, Json, List, Value

    special = {
        None: Value("string"),
        "empty": List(Value("string")),
        "strings": List(Value("string")),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "json": Json(),
    }
    return Features({name: special.get(kind) or Value(str(kind)) for name, kind in kinds.items()})
