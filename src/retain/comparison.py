"""Several sets of methods on the same tasks: a run each, and the base model's answers asked once for all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from retain.config import RunConfig, parse
from retain.errors import ConfigError
from retain.results import Results
from retain.rundir import RunDirectory, share_baseline

EXAMPLE = "--methods 'naive=[lora]' --methods 'replay=[lora, replay: {fraction: 0.3}]'"


def method_sets(config: RunConfig, entries: Sequence[str], folder: Path) -> dict[str, RunConfig]:
    """One configuration per set: that of `config` with other methods, in a directory of its own.

    Args:
        config: tasks, model, probes and training of every run; its own methods are not used.
        entries: `NAME=METHODS`, the methods as YAML, in the form of `methods:` in a configuration.
        folder: the runs are `folder/NAME`.

    Raises:
        ConfigError: fewer than two sets, one without a name or with that of another, or methods that cannot be
            read, built or combined.
    """
    from retain.pipeline import plan

    if len(entries) < 2:
        raise ConfigError(f"compare: {len(entries)} of --methods given. Give at least two sets: {EXAMPLE}.")
    found: dict[str, RunConfig] = {}
    for entry in entries:
        name, equals, text = (part.strip() for part in entry.partition("="))
        where = f"--methods {name}"
        if not equals or not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"--methods: '{entry}' given. Expected NAME=METHODS, such as {EXAMPLE}.")
        if name.casefold() in map(str.casefold, found):
            raise ConfigError(f"{where}: two sets have this name. Give each its own.")
        try:
            methods = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "cannot be read"
            raise ConfigError(f"{where}: '{text}' is not YAML ({problem}). Write {EXAMPLE}.") from None
        own = {"name": name, "output": str(folder / name), "methods": methods}
        found[name] = parse(config.model_dump(mode="json") | own, where)
        plan(found[name])
    return found


def run_sets(sets: Mapping[str, RunConfig], say: Callable[[str], None] = print) -> dict[str, Results]:
    """Carry out the runs, or go on with them, in their order; the answers of the base come from the first.

    Args:
        sets: name → configuration; alike apart from name, methods and directory.

    Raises:
        RetainError: as `pipeline.run`.
    """
    from retain.pipeline import run

    results: dict[str, Results] = {}
    first = next(iter(sets.values())).directory
    for name, config in sets.items():
        say(f"\n{name}: {', '.join(str(m) for m in config.methods)}")
        if results and os.environ.get("RANK", "0") == "0":  # under torchrun one process writes
            share_baseline(RunDirectory(first), config)
        results[name] = run(config, say)
    return results
