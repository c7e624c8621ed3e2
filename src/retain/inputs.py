"""What a run reads before it writes anything: tasks, old rows, probes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.config import RunConfig
from retain.data import fingerprint
from retain.data.chat import count_long, long_note, template_check, to_chat
from retain.data.sources import load_rows
from retain.data.tasks import Task, load_task
from retain.errors import ConfigError, DataError
from retain.results import ProbeInfo

Say = Callable[[str], None]
_FLIPS = 0.05  # share of answers that flip in a usual fine-tuning without anything being lost


def load_tasks(config: RunConfig, tokenizer: Any, max_length: int | None, say: Say) -> list[Task]:
    """The tasks in order; what there is to know about their rows is said.

    Raises:
        DataError: data that is not there or cannot be used.
        ConfigError: a setting, or a chat template, that does not fit the data.
    """
    tasks = []
    for name, entry in zip(config.task_names, config.tasks):
        spec = entry.model_dump(exclude_none=True) | {"name": name}
        task = load_task(spec, seed=config.seed, tokenizer=tokenizer, max_length=max_length)
        template_check(tokenizer, entry.on, chat=task.form != "text")
        for note in task.notes:
            say(f"{name}: {note}")
        tasks.append(task)
    return tasks


def load_old(config: RunConfig, tokenizer: Any = None, max_length: int | None = None, say: Say = print) -> Any:
    """The user's rows that stand for old data, in chat form; None when there are none.

    With a tokenizer and a length, it is said how many are longer.

    Raises:
        DataError: rows that are not there or cannot be used.
        ModelError: the tokenizer has no chat template, and the rows need one.
    """
    if config.old is None:
        return None
    rows = to_chat(load_rows(config.old, "train", seed=config.seed), config.old)
    if tokenizer is not None and max_length is not None:
        template_check(tokenizer, chat="text" not in rows.column_names)
        if long := count_long(rows, tokenizer, max_length):
            say(f"old: {long_note(long, len(rows), max_length)}")
    return rows


def hold_to_context(config: RunConfig, train: dict[str, Any], tokenizer: Any, say: Say) -> None:
    """Set `max_length` of the training to the model's context where it is longer or null, and say so.

    Raises:
        ModelError: the model has no configuration.
    """
    from retain.models.load import known_context, load_settings

    settings = load_settings(config.model)
    context = known_context(settings.get_text_config(), tokenizer)
    given = train.get("max_length")
    if context is None or (given is not None and given <= context):
        return
    train["max_length"] = context
    what = "null" if given is None else f"{given} is more than the model can read"
    say(f"train.max_length: {what}; rows are held to the model's context of {context} tokens")


@dataclass
class Rows:
    """What is learned and what stands for old data.

    Args:
        tokenizer: of the model.
        tasks: in order.
        old: the user's old rows in chat form, or None.
        notes: what was said about them.
    """

    tokenizer: Any
    tasks: list[Task]
    old: Any
    notes: list[str]


def read_rows(config: RunConfig, train: dict[str, Any], say: Say) -> Rows:
    """Tokenizer, tasks and old rows of a run; `train` is held to the model's context.

    Args:
        train: settings of the training, complete.

    Raises:
        RetainError: as the functions above.
    """
    from retain.models.load import load_tokenizer

    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    tokenizer = load_tokenizer(config.model.name, config.model.revision, config.model.trust_remote_code)
    hold_to_context(config, train, tokenizer, note)
    longest = train.get("max_length")
    tasks = load_tasks(config, tokenizer, longest, note)
    return Rows(tokenizer, tasks, load_old(config, tokenizer, longest, note), notes)


def digests(config: RunConfig, rows: Rows) -> dict[str, dict[str, str]]:
    """By what a run directory knows its rows again: setting → part of the rows → digest."""
    found = {f"tasks.{name}": fingerprint.of_task(task) for name, task in zip(config.task_names, rows.tasks)}
    return found | ({} if rows.old is None else {"old": {"rows": fingerprint.of_rows(rows.old)}})


def load_probes(
    config: RunConfig, tasks: list[Task], tokenizer: Any, say: Say
) -> tuple[list[Any], list[ProbeInfo], dict[str, str]]:
    """Probes, what they measure, and each task's test rows as the text of a probe file.

    Raises:
        DataError: a probe that cannot be read or has too few items, or two with one name.
        ConfigError: an option that no probe has, or a budget that so few items cannot certify.
    """
    from retain.probes import suite
    from retain.probes.tasks import task_items

    settings = config.probes
    probes, infos, questions = [], [], {}
    for where, source, options in _references(config):
        loaded = suite.load_probes(source, settings.limit, say=say, **options)
        require_effect(options, loaded, f"{where}: {source}")
        for probe in loaded:
            require_items(probe, f"{where}: {source}", {"probes.limit": settings.limit})
            probes.append(probe)
            infos.append(probe.info("reference"))
    for entry, task in zip(config.tasks, tasks):
        items = task_items(task.test_rows, task.name, tokenizer, entry.list_choices)
        known, options = suite.kinds(), settings.tasks.given()
        items = [row | {k: v for k, v in options.items() if k in known[row["kind"]].settings} for row in items]
        if not items:
            say(f"{task.name}: no test rows that can be scored; what it learns is not measured.")
            continue
        questions[task.name] = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        for probe in suite.probes_from_rows(items, task.name, settings.task_limit):
            limits = {"test_limit": entry.test_limit, "probes.task_limit": settings.task_limit}
            require_items(probe, f"tasks.{task.name}", limits, "test rows, with `test:` or a larger `hold_out:`")
            probes.append(probe)
            infos.append(probe.info("task", task.name))
    if not probes:
        raise DataError(
            "probes: nothing to measure: no old ability is named, and no task has test rows. Name some under "
            "`probes.reference` (core is built in), or give rows with `test:` or `hold_out:`."
        )
    of_tasks = [probe for probe, info in zip(probes, infos) if info.role == "task"]
    require_effect(settings.tasks.given() if of_tasks else {}, of_tasks, "probes.tasks")
    names = [info.name for info in infos]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"probes: two probes are called '{name}'. Give the task another `name:`.")
    if config.budget is not None:
        _check_budget(config, budget_probes(config, probes, infos), say)
    return probes, infos, questions


def _references(config: RunConfig) -> list[tuple[str, str, dict[str, Any]]]:
    """(setting, source, options) of every source of old abilities: also those that only the budget names."""
    found = [
        ("probes.reference", one, {}) if isinstance(one, str) else ("probes.reference", one.data, one.given())
        for one in config.probes.reference
    ]
    listed = {source for _, source, _ in found}
    wanted = config.budget.on if config.budget is not None and config.budget.on else []
    return found + [("budget.on", source, {}) for source in dict.fromkeys(wanted) if source not in listed]


def budget_probes(config: RunConfig, probes: Sequence[Any], infos: Sequence[ProbeInfo]) -> list[Any]:
    """Those of a run's probes that its budget is on: all of old abilities, or those of the sources that it names."""
    from retain.probes import suite

    old = [probe for probe, info in zip(probes, infos) if info.role == "reference"]
    wanted = set(config.budget.on or []) if config.budget is not None else set()
    if not wanted or all(source in wanted for _, source, _ in _references(config)):
        return old
    names = {
        probe.name
        for _, source, options in _references(config)
        if source in wanted
        for probe in suite.load_probes(source, config.probes.limit, **options)
    }
    return [probe for probe in old if probe.name in names]


def _check_budget(config: RunConfig, kept: Sequence[Any], say: Say) -> None:
    """Find out whether the budget can be certified with the items of the probes that it is on, before any is asked.

    Raises:
        ConfigError: no such probe, or too few items even if no answer changes; with the number that is needed.
    """
    from retain.functional import budget as maths
    from retain.items import is_divergence

    assert config.budget is not None
    limit, confidence = config.budget.lose_at_most, config.budget.confidence
    infos = [probe.info("reference") for probe in kept]
    if all(is_divergence(info) for info in infos):
        raise ConfigError("budget.on: no probe whose loss can be bounded. Name a suite or a file with questions.")
    sizes = [info.items for info in infos if not info.is_perplexity and not is_divergence(info)]
    maths.require_items(limit, confidence, sizes)
    if sizes and (more := maths.items_needed(limit, confidence, _FLIPS, sizes)) > sum(sizes):
        say(
            f"budget: {sum(sizes)} items can show a loss of at most {limit:.2%} while few answers change; if "
            f"{_FLIPS:.0%} of them flip by chance, about {more} are needed."
        )


def require_items(probe: Any, where: str, limits: Mapping[str, int | None], more: str = "items") -> None:
    """Refuse a probe whose answers would give no interval, before they are asked for.

    Args:
        where: what the items belong to.
        limits: settings that leave at most so many of them.
        more: what to give more of.

    Raises:
        DataError: too few items.
    """
    count = len(probe.items)
    if count < probe.fewest:
        tight = " and ".join(name for name, limit in limits.items() if limit is not None and limit < probe.fewest)
        raise DataError(
            f"{where}: {count} item{'' if count == 1 else 's'} for '{probe.name}' given; {probe.metric} needs at least "
            f"{probe.fewest} for an interval. {f'Raise {tight}' if tight else f'Give more {more}'}."
        )


def require_effect(options: Iterable[str], probes: Sequence[Any], where: str) -> None:
    """Refuse an option that none of the probes has.

    Raises:
        ConfigError: such an option.
    """
    for option in options:
        if not any(option in probe.settings for probe in probes):
            kinds = ", ".join(sorted({probe.kind for probe in probes}))
            raise ConfigError(f"{where}: {option} has no effect on probes of kind {kinds}. Leave it out.")


def space_needed(config: RunConfig, lora: bool) -> int:
    """Bytes that the run will write, about; 0 when the weights are not on this disk."""
    from retain.models.load import resolve

    weights = sum(f.stat().st_size for f in Path(resolve(config.model.name)).glob("*.safetensors"))
    # full tuning keeps two checkpoints of weights and two Adam moments, the start, and a model per task
    return int(weights * (0.5 if lora else 7 + len(config.tasks)))
