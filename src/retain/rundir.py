"""The run directory: what is where, what is finished, and which model belongs to which stage."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from retain.config import RunConfig, dump, parse
from retain.errors import RunError
from retain.results import write_text

BASE = "00-base"

#: Digests of rows: setting → part of it → digest.
Data = Mapping[str, Mapping[str, str]]


class RunDirectory:
    """Paths and marks of one run.

    Args:
        path: the directory; made by `begin`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # -- paths -------------------------------------------------------------------------------------------
    @property
    def config(self) -> Path:
        return self.path / "run.yaml"

    @property
    def data(self) -> Path:
        """By which the rows of the run are known again."""
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def task(self, stage: str) -> Path:
        """Folder of one task: its model, its checkpoints, its mark."""
        return self.path / "tasks" / stage

    def items(self, stage: str) -> Path:
        """Item table of a stage."""
        return self.path / "probes" / f"{stage}.parquet"

    def asked(self, stage: str) -> Path:
        """Answers of a stage while their numbers are not there yet; then they move to `items`."""
        return self.path / "probes" / f"{stage}.asked"

    @property
    def base_outputs(self) -> Path:
        """What the base said in contexts in which later stages are compared with it."""
        return self.path / "probes" / "base"

    @property
    def budget(self) -> Path:
        """What a budget compares with, and what it came to: a file per task."""
        return self.path / "budget"

    def questions(self, name: str) -> Path:
        """A task's test rows as a probe file."""
        return self.path / "probes" / f"{name}.jsonl"

    # -- begin and continue --------------------------------------------------------------------------------
    def check(self, config: RunConfig, data: Data | None = None) -> list[str]:
        """Find out whether the directory can be used for this configuration on these rows; nothing is written.

        A finished run may be continued with more tasks (the earlier ones must be the same, and so must their rows) and
        judged anew: `verdict` and `language` are about what is done with the measurements.

        Args:
            config: of the run.
            data: digests of the rows, by setting (`tasks.NAME`, `old`) and part of it; None compares no rows.

        Returns:
            The settings whose rows cannot be compared, as the directory was made when none were recorded.

        Raises:
            RunError: the directory holds another run or other things, or there cannot be one.
        """
        unknown: list[str] = []
        if self.config.is_file():
            earlier = self.read_config()
            self._check_settings(earlier, config)
            unknown = self._check_rows(self._recorded(earlier), data or {})
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: not empty and not a run directory. Choose another `output:`.")
        place = self._existing()
        if not place.is_dir() or not os.access(place, os.W_OK):
            reason = "no permission" if place.is_dir() else f"{place} is a file"
            raise RunError(f"{self.path}: cannot be written ({reason}). Choose another `output:`.")
        return unknown

    def begin(self, config: RunConfig, data: Data | None = None) -> list[str]:
        """Make the directory, or check that it belongs to this configuration; arguments and errors as for `check`."""
        unknown = self.check(config, data)
        recorded = self._recorded(self.read_config()) if self.config.is_file() else {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, dump(config))
            write_text(self.data, json.dumps({**(data or {}), **recorded}, indent=1, ensure_ascii=False) + "\n")
            write_text(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}). Choose another `output:`.") from error
        return unknown

    def _check_settings(self, earlier: RunConfig, config: RunConfig) -> None:
        old, new = earlier.model_dump(mode="json"), config.model_dump(mode="json")
        differs = next(
            (
                key
                for key in new
                if key not in ("tasks", "name", "output", "verdict", "language") and new[key] != old[key]
            ),
            None,
        )
        count = len(earlier.tasks)
        if differs is None and (
            new["tasks"][:count] != old["tasks"] or config.task_names[:count] != earlier.task_names
        ):
            differs = "tasks"
        if differs:
            raise RunError(
                f"{self.path}: this directory holds a run with other `{differs}`. Choose another `output:` (or "
                "`--output`), or delete the directory. More tasks may be added at the end of the list."
            )

    def _check_rows(self, recorded: Mapping[str, Any], data: Data) -> list[str]:
        for setting, parts in data.items():
            for part, digest in parts.items():
                before = (recorded.get(setting) or {}).get(part, digest)
                if before != digest:
                    raise RunError(
                        f"{self.path}: the {part} of `{setting}` changed since this run was made (then {before}, now "
                        f"{digest}). Put the earlier ones back, choose another `output:` (or `--output`), or delete "
                        "the directory."
                    )
        return [setting for setting in data if recorded.get(setting, {}) is None]

    def _recorded(self, earlier: RunConfig) -> dict[str, Any]:
        """Digests of the rows that the run was made with; None where they are not known, as in an older directory."""
        if not self.data.is_file():
            return dict.fromkeys([*(f"tasks.{name}" for name in earlier.task_names), "old"])
        try:
            return dict(json.loads(self.data.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.data}: damaged ({error}). Delete it; rows are then no longer compared.") from error

    def read_config(self) -> RunConfig:
        """The configuration that the run was made with.

        Raises:
            RunError: this is not a run directory.
        """
        if not self.config.is_file():
            raise RunError(f"{self.path}: no run.yaml here. Give a run directory such as runs/<name>.")
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(
                f"{self.config}: damaged ({' '.join(str(error).split())}). Put back the configuration of the run."
            ) from error
        return parse(values, str(self.config))

    # -- marks ---------------------------------------------------------------------------------------------
    def done(self, stage: str) -> dict[str, Any] | None:
        """The summary of a finished task, or None."""
        mark = self.task(stage) / "done.json"
        try:
            return json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else None
        except ValueError as error:
            raise RunError(f"{mark}: damaged ({error}). Delete it; the task is then trained again.") from error

    def save_task(self, stage: str, parts: Mapping[str, Callable[[Path], Any]], summary: dict[str, Any]) -> None:
        """Write a task's model under temporary names, rename them, then mark the task done and drop checkpoints.

        Args:
            parts: what the model consists of, by folder name (`models.load.parts`): each writes the folder it is given.
        """
        folder = self.task(stage)
        for name, write in parts.items():
            partial, final = folder / f"{name}.part", folder / name
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            write(partial)
            os.replace(partial, final)
        write_text(folder / "done.json", json.dumps({**summary, "kind": "+".join(parts)}, indent=1) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    def drop_models(self) -> None:
        """Delete the weights of all tasks; what was measured, and the marks, stay."""
        for stage in (self.path / "tasks").glob("*"):
            for one in stage.iterdir():
                if one.is_dir():
                    shutil.rmtree(one, ignore_errors=True)
                elif one.suffix == ".safetensors":
                    one.unlink(missing_ok=True)

    def require_space(self, needed: int) -> None:
        """Refuse to start what cannot be saved.

        Args:
            needed: bytes.

        Raises:
            RunError: less is free.
        """
        place = self._existing()
        free = shutil.disk_usage(place if place.is_dir() else place.parent).free
        if free < needed:
            raise RunError(
                f"{self.path}: {free / 2**30:.1f} GiB are free, about {needed / 2**30:.1f} GiB are needed for "
                "checkpoints and models. Free some space, choose another `output:`, or use `lora`."
            )

    def _existing(self) -> Path:
        """The directory, or the nearest thing above it that is there."""
        place = self.path.absolute()
        while not os.path.exists(place):
            place = place.parent
        return place


def share_baseline(source: RunDirectory, config: RunConfig) -> None:
    """Begin a run with the base's answers of another one: same model, same items, so they need not be asked twice."""
    place = RunDirectory(config.directory)
    place.begin(config)
    answers, path = source.items(BASE).read_bytes(), place.items(BASE)
    if path.is_file() and path.read_bytes() == answers:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(answers)
    if source.base_outputs.is_dir():
        shutil.copytree(source.base_outputs, place.base_outputs, dirs_exist_ok=True)
    os.replace(partial, path)


def stage_name(index: int, task: str) -> str:
    """`02-arithmetic` for the second task."""
    return f"{index:02d}-{''.join(c if c.isalnum() or c in '-_.' else '_' for c in task)}"


def environment() -> dict[str, Any]:
    """Versions and hardware, for `env.json`."""
    versions = {}
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "numpy")
    for name in ("retain-llm", *libraries):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
    }
    if "torch" in sys.modules:
        import torch

        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found
