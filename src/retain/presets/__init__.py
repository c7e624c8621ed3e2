"""Recipes by scenario: methods and training settings under one name, a YAML file each beside this one. No torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from retain.errors import ConfigError, unknown


@lru_cache
def names() -> tuple[str, ...]:
    """All presets."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yaml")))


def text(name: str) -> str:
    """A preset as it is written.

    Raises:
        ConfigError: no such preset; the nearest name is suggested.
    """
    if name not in names():
        raise ConfigError(unknown("preset", str(name), names()))
    return (Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")


def about(name: str) -> str:
    """What a preset is for, in one line: the first of its file."""
    return text(name).splitlines()[0].removeprefix("# ")


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its `preset` filled in: what the configuration says itself goes first.

    Methods that are given replace the preset's; training settings are joined, key by key. Unknown keys pass through.

    Raises:
        ConfigError: no such preset.
    """
    if values.get("preset") is None:
        return values
    preset = yaml.safe_load(text(values["preset"]))
    train = values.get("train") or {}
    joined = {"train": {**preset.get("train", {}), **train}} if isinstance(train, dict) else {}
    return preset | values | joined
