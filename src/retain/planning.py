"""What can be known of a run before its weights are loaded: that its settings fit together, and its directory them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retain.config import RunConfig
from retain.errors import ConfigError, unknown
from retain.inputs import Rows, Say, digests, space_needed
from retain.methods import build
from retain.methods.base import Stack
from retain.results import load_items
from retain.rundir import BASE, RunDirectory, stage_name
from retain.training import arguments


@dataclass
class Plan:
    """Everything that can be known before the weights are loaded."""

    config: RunConfig
    stack: Stack
    train: dict[str, Any]
    stages: list[str]


def plan(config: RunConfig) -> Plan:
    """Check a configuration without loading weights.

    Raises:
        ConfigError: methods that clash or lack what they need, unknown training settings.
        DataError: data that is not there.
    """
    try:
        return _planned(config)
    except ConfigError as error:
        raise ConfigError(f"{config.where}: {error}" if config.where else str(error)) from error.__cause__


def _planned(config: RunConfig) -> Plan:
    stack = Stack(build(config.methods))
    stack.check_needs(frozenset({"old"} if config.old else ()), config.task_names)
    if config.private:
        stack.check_private(bool(config.old))
    names = {m.name for m in stack.methods}
    if config.model.quantize != "none" and "lora" not in names:
        raise ConfigError("model.quantize: quantised weights cannot be trained. Add `lora` to the methods.")
    if config.model.quantize != "none" and "interpolate" in names and len(config.tasks) > 1:
        raise ConfigError(
            "model.quantize: on a quantised base one adapter learns all tasks, and `interpolate` needs a fresh one "
            "for each. Remove `interpolate`, give one task, or set `quantize: none`."
        )
    if config.monitor is not None and config.monitor.raised and config.monitor.raised not in names:
        raise ConfigError(unknown("monitor.raised", config.monitor.raised, names))
    _check_budget(config, stack)
    on_policy = stack.writer.name if stack.writer is not None else ""
    for name, task in zip(config.task_names, config.tasks):
        if on_policy and (task.on != "completion" or task.streaming):
            setting = "streaming" if task.streaming else "on"
            raise ConfigError(
                f"tasks.{name}.{setting}: not with `{on_policy}`, which learns from answers that the model writes. "
                "Remove it."
            )
    lora = any(m.adds_parameters for m in stack.methods)
    train = arguments.complete(config.train, lora=lora, on_policy=on_policy)
    stages = [BASE] + [stage_name(i, name) for i, name in enumerate(config.task_names, 1)]
    return Plan(config, stack, train, stages)


def _check_budget(config: RunConfig, stack: Stack) -> None:
    """Refuse a budget beside something that it cannot go with.

    Raises:
        ConfigError: a monitor that raises a strength too, or a method whose model cannot be led back.
    """
    if config.budget is None and not any(m.auto for m in stack.methods):
        return
    if config.monitor is not None and config.monitor.raised:
        what = "budget" if config.budget is not None else "strength: auto"
        raise ConfigError(
            f"{what}: it and `monitor.raised` would both move the strengths. Remove one of them; a monitor may still "
            "warn, stop or restore."
        )
    if config.budget is not None:
        from retain.training.settling import refuse

        refuse(stack)


def check_directory(planned: Plan, rows: Rows, say: Say) -> dict[str, dict[str, str]]:
    """Check that the run directory can take this run, or go on with it; nothing is written.

    Returns:
        The digests of the rows, for `RunDirectory.begin`.

    Raises:
        RunError: it holds another run or other things, cannot be written or is damaged, or there is too little space.
    """
    config, place = planned.config, RunDirectory(planned.config.directory)
    data = digests(config, rows)
    for setting in place.check(config, data):
        say(f"{setting}: this run was made when rows were not recorded; whether they changed is not known.")
    place.require_space(space_needed(config, any(m.name == "lora" for m in planned.stack.methods)))
    for stage in planned.stages:
        place.done(stage)
        if place.items(stage).is_file():
            load_items(place.items(stage))
    return data
