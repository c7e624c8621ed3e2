"""Advice as a configuration with its reasons: YAML that `retain run` takes as it is."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from retain.advice.recipes import Choice

WIDTH = 118


def comment(text: str, indent: int = 0) -> str:
    """Lines that begin with #."""
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=" " * indent + "# ",
        subsequent_indent=" " * indent + "# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def scalar(value: Any) -> str:
    """A value as YAML reads it, in one line."""
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e-0", "e-") if "." in text else text.replace("e", ".0e")  # YAML wants a point in 1e-05
    if isinstance(value, str):
        return yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    return json.dumps(value, ensure_ascii=False)


def document(
    head: Sequence[str],
    tasks: Sequence[Mapping[str, Any]],
    model: tuple[str, Sequence[Choice]],
    methods: Sequence[tuple[str, Sequence[Choice]]],
    train: Sequence[Choice],
    others: Sequence[tuple[str, Any, Choice | None]],
) -> str:
    """The configuration as text; every choice stands under its reason and where that is from.

    Args:
        head: paragraphs of the comment on top.
        tasks: settings of every task.
        model: its name, and how its weights are held.
        methods: names in order, each with its settings.
        train: settings of the training.
        others: (key, value, reason) of the top level: `private`, `old`, `budget`, `probes`, `output`.
    """
    lines = [comment(paragraph) for paragraph in head] + [""]
    lines += ["model:", f"  name: {scalar(model[0])}", *_settings(model[1], 2)]
    lines += ["", "tasks:"]
    for task in tasks:
        items = [f"{key}: {scalar(value)}" for key, value in task.items()]
        lines += [f"  - {items[0]}", *(f"    {item}" for item in items[1:])]
    for key, value, why in others:
        lines.append("")
        if why is not None:
            lines.append(comment(f"{why.why} ({why.source})"))
        lines.append(f"{key}: {scalar(value)}")
    lines += ["", "methods:"]
    for name, choices in methods:
        lines += [f"  - {name}:", *_settings(choices, 6)]
    lines += ["", "train:", *_settings(train, 2)]
    return "\n".join(lines) + "\n"


def _settings(choices: Sequence[Choice], indent: int) -> list[str]:
    lines, said = [], ""
    for choice in choices:
        reason = f"{choice.why} ({choice.source})"
        if reason != said:  # settings of one line of a table share its reason
            lines.append(comment(reason, indent))
        said = reason
        lines.append(f"{' ' * indent}{choice.setting.rpartition('.')[2]}: {scalar(choice.value)}")
    return lines
