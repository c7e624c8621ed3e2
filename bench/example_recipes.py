"""How a method is used: the methods of examples/NAME.yaml, that is the method itself and what it needs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retain.config import read

_EXAMPLES = Path(__file__).parent.parent / "examples"


def recipe(name: str) -> list[Any]:
    """The methods of its example; the method alone where there is none."""
    path = _EXAMPLES / f"{name}.yaml"
    return list(read(path).methods) if path.is_file() else [name]


def names_of(entries: Sequence[Any]) -> list[str]:
    """The names in a list of methods."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def without(entries: Sequence[Any], name: str) -> list[Any]:
    """The rest of a recipe."""
    return [entry for entry, own in zip(entries, names_of(entries)) if own != name]


def changed(entries: Sequence[Any], name: str, **settings: Any) -> list[Any]:
    """A recipe with other settings of one method."""
    found = []
    for entry, own in zip(entries, names_of(entries)):
        given = {} if isinstance(entry, str) else entry[own] or {}
        found.append({name: given | settings} if own == name else entry)
    return found
