"""What a model wrote, call by call, on disk: writing that was stopped goes on where it was, to the same rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retain.results import append


class Memory:
    """Answers a call of the model that was made before from a file.

    Args:
        path: JSON Lines, one call each; half a line of a killed process is passed over. What was asked is kept as
            a hash only.
        stamp: of the model and its settings; what was written under another one is not used.
    """

    def __init__(self, path: Path, stamp: list[Any]) -> None:
        self.path, self.stamp = path, stamp
        self.texts: dict[str, list[Any]] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.texts[record["call"]] = record["texts"]

    def __call__(self, asked: list[Any], ask: Callable[[], list[Any]]) -> list[Any]:
        key = hashlib.sha256(json.dumps([self.stamp, asked]).encode()).hexdigest()
        if key not in self.texts:
            self.texts[key] = ask()
            append(self.path, {"call": key, "texts": self.texts[key]})
        return self.texts[key]

    def forget(self) -> None:
        """Delete the file; the work is done."""
        self.path.unlink(missing_ok=True)
