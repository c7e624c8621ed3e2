"""The methods. The directory is the registry: one file per method, named as in the configuration."""

from __future__ import annotations

import ast
import importlib
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from retain.errors import ConfigError, unknown

#: Families of methods in the order in which they are shown, with what is kept.
FAMILIES = {
    "baseline": "Plain fine-tuning, to compare with",
    "weights": "Weights stay near where they were",
    "functions": "Answers stay what they were",
    "tokens": "Tokens that would overwrite the most weigh less",
    "gradients": "Steps leave old directions alone",
    "replay": "Old rows again",
    "isolation": "Parts of the model do not move",
    "merging": "After training",
}
#: Files that hold no method.
_SUPPORT = {
    "__init__",
    "base",
    "context",
    "distilling",
    "gathering",
    "paced",
    "prioritised",
    "pulling",
    "remembering",
    "weighing",
    "worth",
    "writing",
}


@lru_cache
def names() -> tuple[str, ...]:
    """All method names, built-in and from installed packages; nothing is imported."""
    own = {path.stem for path in Path(__file__).parent.glob("*.py")} - _SUPPORT
    return tuple(sorted(own | {point.name for point in entry_points(group="retain.methods")}))


def load(name: str) -> type:
    """The method class of a name.

    Raises:
        ConfigError: no such method; the nearest name is suggested.
    """
    from retain.methods.base import Method

    if name not in names():
        raise ConfigError(unknown("methods", name, names()))
    if not (Path(__file__).parent / f"{name}.py").is_file():
        return next(point for point in entry_points(group="retain.methods") if point.name == name).load()
    module = importlib.import_module(f"retain.methods.{name}")
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Method) and item.__module__ == module.__name__
    ]
    assert len(found) == 1, f"methods/{name}.py must define exactly one Method, found {found}"
    return found[0]


def build(entries: list[Any] | dict[str, Any] | None) -> list[Any]:
    """Method objects from configuration: names, `{name: settings}` entries, or a mapping of both.

    Raises:
        ConfigError: an unknown method or setting.
    """
    if entries is None:
        return []
    items: list[tuple[str, dict[str, Any]]] = []
    for entry in entries.items() if isinstance(entries, dict) else entries:
        if isinstance(entry, str):
            items.append((entry, {}))
        elif isinstance(entry, tuple):
            items.append((entry[0], entry[1] or {}))
        elif isinstance(entry, dict) and len(entry) == 1:
            name, settings = next(iter(entry.items()))
            items.append((name, settings or {}))
        else:
            raise ConfigError(f"methods: cannot read {entry!r}. Write `- ewc` or `- ewc: {{strength: 1.0}}`.")
    for name, settings in items:
        if not isinstance(settings, dict):
            raise ConfigError(f"methods.{name}: settings must be a mapping, got {settings!r}.")
    return [load(name)(**settings) for name, settings in items]


@lru_cache
def summaries() -> dict[str, dict[str, str]]:
    """Name → class name, family, paper and docstring, read from the source without importing it."""
    found = {}
    for name in names():
        path = Path(__file__).parent / f"{name}.py"
        if not path.is_file():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(getattr(b, "id", "") == "Method" for b in node.bases):
                strings = {
                    s.targets[0].id: s.value.value
                    for s in node.body
                    if isinstance(s, ast.Assign)
                    and isinstance(s.targets[0], ast.Name)
                    and isinstance(s.value, ast.Constant)
                    and isinstance(s.value.value, str)
                }
                found[name] = {
                    "class": node.name,
                    "family": strings.get("family", ""),
                    "paper": strings.get("paper", ""),
                    "doc": ast.get_docstring(tree) or "",
                }
    return found
