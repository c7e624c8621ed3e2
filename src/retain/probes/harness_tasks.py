"""Find tasks of lm-evaluation-harness: by name, in a task file, or in a folder of task files."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retain.errors import DataError

PREFIX = "lm_eval:"
_FILES = (".yaml", ".yml")


def tasks_of(source: str) -> tuple[dict[str, Any], str]:
    """(tasks by name, name of the wanted metric or "") of a source such as `lm_eval:arc_easy@acc_norm`.

    A group or a tag gives all its tasks. A word is a task file or a folder where there is such a file or a folder
    with task files, else a name.

    Raises:
        DataError: the harness is not installed; an unknown task; a file or data that cannot be loaded.
    """
    body, _, metric = source.removeprefix(PREFIX).rpartition("@")
    if not body:
        body, metric = metric, ""
    if not body:
        raise DataError(f"{source}: no task. Give a name, a task file or a folder, such as lm_eval:arc_easy.")
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError:
        raise DataError(
            f"{source}: lm-evaluation-harness is not installed. Install it with `pip install 'retain-llm[harness]'`."
        ) from None
    path = Path(body).expanduser()
    if path.is_dir() and (found := sorted(p for p in path.rglob("*") if p.suffix in _FILES)):
        return _load(source, *_in_folder(source, path, found)), metric
    if "/" in body or path.suffix in _FILES:
        if not path.is_file():
            raise DataError(f"{source}: no such task file, nor a folder with task files (*.yaml).")
        return _load(source, *_in_file(source, path)), metric
    return _load(source, *_by_name(source, body)), metric


@contextlib.contextmanager
def as_the_harness() -> Iterator[None]:
    """Random numbers begin where the harness lets them begin, and afterwards where they were; nothing is printed."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    log = logging.getLogger("lm_eval")
    level, plain, arrays = log.level, random.getstate(), np.random.get_state()
    log.setLevel(logging.ERROR)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(gpus, device_type="cuda"):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
        log.setLevel(level)


def _by_name(source: str, name: str) -> tuple[Any, list[str]]:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    # most tasks are in a file of their name: to read all fifteen thousand others takes many seconds
    if re.fullmatch(r"[\w-]+", name):
        files = list(Path(lm_eval.tasks.__file__).parent.rglob(f"{name}.yaml"))
        if len(files) == 1 and load_yaml(files[0], resolve_func=False).get("task") == name:
            return _manager(defaults=False), [str(files[0])]
    manager = _manager()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f" Did you mean {' or '.join(repr(word) for word in near)}?" if near else ""
        raise DataError(f"{source}: unknown task '{name}'.{hint} `lm-eval ls tasks` lists all.")
    return manager, [name]


def _in_file(source: str, path: Path) -> tuple[Any, list[str]]:
    """A task file stands alone; a group file names tasks beside it, or of the harness."""
    settings = _read(source, path)
    manager, name = _manager(None, defaults=False), str(path)
    if "group" in settings:
        manager = _manager(path.parent.resolve(), defaults=False)
        name = str(settings["group"])
        named = [member for member in settings.get("task") or [] if isinstance(member, str)]
        if not set(named) <= set(manager.all_tasks):
            manager = _manager(path.parent.resolve())
            if strange := sorted(set(named) - set(manager.all_tasks)):
                raise DataError(
                    f"{source}: no task '{strange[0]}', neither beside this file nor in the harness. Correct `task:`."
                )
    elif "task" not in settings:
        raise DataError(f"{source}: neither `task:` nor `group:` in it. Give a task file of lm-evaluation-harness.")
    return manager, [name]


def _in_folder(source: str, path: Path, files: list[Path]) -> tuple[Any, list[str]]:
    """All groups and tasks; files without a name are parts that others include."""
    for file in files:
        _read(source, file)  # the harness passes over what it cannot read
    manager = _manager(path.resolve(), defaults=False)
    names = [*manager.all_groups, *manager.all_subtasks]
    if not names:
        raise DataError(f"{source}: no file in it has `task:` or `group:`. Give task files of lm-evaluation-harness.")
    return manager, names


def _load(source: str, manager: Any, names: list[str]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for name in names:
        if name in tasks:  # of a group before
            continue
        try:
            with as_the_harness():
                tasks |= manager.load([name])["tasks"]
        except Exception as error:  # a task is a program: its files, functions and data may fail in any way
            line = " ".join(str(error).split())[:300] or "no reason given"
            if isinstance(error, ConnectionError | OSError):
                raise DataError(
                    f"{source}: the data of '{Path(name).stem}' cannot be loaded ({line}). Data from the hub need a "
                    "network once, then they are kept; or give a task file whose data are local."
                ) from error
            kind = type(error).__name__
            raise DataError(f"{source}: '{name}' cannot be loaded ({kind}: {line}). Check the task file.") from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(f"{source}: '{name}' runs code that the model writes, which retain does not. Leave it out.")
        if getattr(task, "MULTIMODAL", False):
            raise DataError(f"{source}: '{name}' shows pictures or sound; only text is asked here. Leave it out.")
    return tasks


def _read(source: str, path: Path) -> dict[str, Any]:
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{source}: {path} cannot be read ({' '.join(str(error).split())}).") from error


@functools.lru_cache(maxsize=4)
def _manager(folder: Path | None = None, defaults: bool = True) -> Any:
    """The harness's list of tasks; to read all of its own takes many seconds."""
    from lm_eval.tasks import TaskManager
    from rich.console import Console

    if not defaults:
        return TaskManager(include_path=folder, include_defaults=False)
    with Console(stderr=True).status("lm-evaluation-harness reads the names of its tasks"):
        return TaskManager(include_path=folder)
