"""What tells rows from other rows: a digest that a run directory keeps, so that it knows its data again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from retain.data.sources import locate
from retain.data.tasks import Task

BATCH = 1000


def of_rows(rows: Any) -> str:
    """Digest of rows in their order: a list of rows, or a data set of known length."""
    found = hashlib.blake2b(digest_size=16)
    parts: Iterable[Any] = rows if isinstance(rows, list) else rows.iter(BATCH)
    for part in parts:
        found.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return f"{found.hexdigest()} ({len(rows)} rows)"


def of_task(task: Task) -> dict[str, str]:
    """The digests of a task's rows, as they were loaded.

    A stream is not read for this: of a local file its size and time of change are taken, of a hub id nothing.
    """
    streamed = not hasattr(task.rows, "__len__")
    train = _of_file(task.source) if streamed else of_rows(task.rows)
    return {"training rows": train, "test rows": of_rows(task.test_rows)}


def _of_file(where: str) -> str:
    path = locate(where, "train")
    if path is None:
        return "a stream from the hub: not compared"
    about = path.stat()
    return f"a stream: {about.st_size} bytes, changed at {about.st_mtime_ns}"
