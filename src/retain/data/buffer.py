"""A replay buffer on disk: a fixed number of old rows, each with an equal chance of being there.

A buffer is a directory with one Parquet file of rows and `state.json`, which names that file, says how many
rows were seen and holds the random numbers. Rows are written first and `state.json` is renamed into place
last, so a buffer killed while it was written is the buffer of before. Adding goes on after reopening exactly
as if the buffer had never been closed.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from retain.data.json_rows import quiet
from retain.errors import ConfigError, DataError, RunError, unknown
from retain.functional.sampling import Reservoir
from retain.results import write_text

POLICIES = ("reservoir", "balanced")
#: Columns that a buffer adds: where a row is from, its task, and its place in all rows seen (from 1).
METADATA = ("source", "task", "added_at")
_PLACE = ("group", "slot")
_FORMS = (("prompt", "completion"), ("messages",), ("text",))
_VERSION = 1


class Buffer:
    """Old rows kept for replay.

    Args:
        directory: made when the first rows are added.
        size: rows that are kept at most.
        policy: "reservoir" keeps a uniform sample of all rows seen: after N of them each is there with
            probability min(1, size/N) (Vitter 1985, algorithm R). "balanced" keeps a reservoir of
            size // (number of tasks) rows for each task; a new task makes the others smaller, by a uniform
            draw, so that each task's rows stay a uniform sample of that task.
        seed: of every draw.

    Only one process may add; any number may read.

    Raises:
        ConfigError: an unknown policy or a size below 1.
        RunError: the directory holds a buffer with other settings, or a damaged one.
    """

    policies = POLICIES

    def __init__(self, directory: str | Path, size: int = 10_000, policy: str = "reservoir", seed: int = 0) -> None:
        if policy not in self.policies:
            raise ConfigError(unknown("buffer.policy", policy, self.policies))
        if size < 1:
            raise ConfigError(f"buffer.size: {size} given. Allowed: 1 or more.")
        self.directory, self.size, self.policy, self.seed = Path(directory), size, policy, seed
        self.seen = 0
        self._file: str | None = None
        self._groups: dict[str, Reservoir] = {}
        self._cached: Dataset | None = None
        self._reopen()

    def __len__(self) -> int:
        return 0 if self._file is None else len(self._stored())

    def rows(self) -> Dataset:
        """All rows with their `METADATA`, memory-mapped, in the order of their slots.

        Raises:
            DataError: nothing was ever added.
        """
        if self._file is None:
            raise DataError(f"{self.directory}: the buffer is empty. Add rows before replaying them.")
        stored = self._stored()
        return stored.remove_columns([name for name in _PLACE if name in stored.column_names])

    def before(self, source: str) -> Buffer:
        """The buffer as it was before the rows of `source` were added, if they were the last; else itself.

        A run that was killed after a task filled the buffer goes on with what it replayed before, also where rows had
        to make room for those of the task.
        """
        if source not in self.counts("source"):
            return self
        twin = copy.copy(self)
        twin.directory = self.directory / "before"
        twin._reopen()
        return twin

    def counts(self, column: str = "task") -> dict[str, int]:
        """Rows per task (or per source), in the order of the names."""
        if self._file is None:
            return {}
        return dict(sorted(Counter(self._stored()[column]).items()))

    def add(self, rows: Iterable[Mapping[str, Any]], source: str, task: str | None = None) -> int:
        """Offer rows, in order, and write what is kept.

        Args:
            rows: rows in one of the trainer's forms (`retain.data.chat.to_chat`): a Dataset, a stream, or any
                iterable of mappings. Other columns are left out.
            source: where the rows are from, such as a file or "written by the model".
            task: what they belong to; default: `source`.

        Returns:
            How many of them are in the buffer now.

        Raises:
            DataError: rows of no trainable form, or of another form than those already there.
        """
        try:
            with quiet():
                return self._add(rows, source, source if task is None else task)
        except BaseException:
            self._reopen()  # memory must not be ahead of the disk
            raise

    # ------------------------------------------------------------------------------------------------ inside

    def _add(self, rows: Any, source: str, task: str) -> int:
        stored_rows = isinstance(rows, Dataset)
        names = self._check(rows.column_names, source) if stored_rows else None
        group, before = task if self.policy == "balanced" else "all", self.seen
        moved = self._make_room(group)
        reservoir = self._groups[group]
        taken: dict[int, tuple[int, Any]] = {}  # slot → (place in all rows seen, row or its number)
        offered: Iterable[Any] = range(len(rows)) if stored_rows else rows
        for row in offered:
            if names is None:
                names = self._check(list(row), source)
            self.seen += 1
            slot = reservoir.offer()
            if slot is not None:
                taken[slot] = (self.seen, row if stored_rows else {name: row.get(name) for name in names})
        if self.seen == before:
            self._reopen()
            return 0
        if not taken:
            self._commit(str(self._file))
            return 0
        slots = sorted(taken)
        kept = [taken[slot][1] for slot in slots]
        new = rows.select(kept).select_columns(list(names or ())) if stored_rows else Dataset.from_list(kept)
        new = new.add_column("source", [source] * len(slots)).add_column("task", [task] * len(slots))
        new = new.add_column("added_at", [taken[slot][0] for slot in slots])
        new = new.add_column("group", [group] * len(slots)).add_column("slot", slots)
        self._write(self._merged(moved, new, group, set(slots)))
        return len(slots)

    def _check(self, columns: Iterable[str], source: str) -> tuple[str, ...]:
        """The columns that make the form of these rows, which is the form of the buffer."""
        columns = list(columns)
        form = next((names for names in _FORMS if set(names) <= set(columns)), None)
        if form is None:
            raise DataError(
                f"{source}: columns {', '.join(columns) or '(none)'} cannot be replayed. Give rows with "
                "prompt/completion, messages or text (to_chat makes them)."
            )
        if self._file is not None and not set(form) <= set(self._stored().column_names):
            held = next(names for names in _FORMS if set(names) <= set(self._stored().column_names))
            raise DataError(
                f"{source}: rows with {'/'.join(form)} cannot join a buffer of rows with {'/'.join(held)} "
                f"({self.directory}). Use one form, or another directory."
            )
        return form

    def _make_room(self, group: str) -> Dataset | None:
        """Open a group; when the others must shrink for it, what is left of the stored rows."""
        if group in self._groups:
            return None
        number = len(self._groups) + 1
        quota = self.size // number
        if quota < 1:
            raise DataError(f"{self.directory}: {number} tasks do not fit into {self.size} rows. Raise buffer.size.")
        stored = None if self._file is None else self._stored()
        keep: list[int] = []
        slots: list[int] = []
        for index, (name, reservoir) in enumerate(self._groups.items()):
            there = [row for row, other in enumerate(stored["group"] if stored else []) if other == name]
            if len(there) > quota:
                draw = np.random.default_rng([self.seed, number, index]).permutation(len(there))[:quota]
                there = [there[i] for i in np.sort(draw)]
            keep += there
            slots += range(len(there))
            reservoir.capacity = quota
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self._groups[group] = Reservoir(quota, seed)
        if stored is None or len(keep) == len(stored):
            return None
        return stored.select(keep).remove_columns("slot").add_column("slot", slots)

    def _merged(self, moved: Dataset | None, new: Dataset, group: str, slots: set[int]) -> Dataset:
        """Old rows whose slot was not taken, with the new ones, by group and slot."""
        if moved is None:
            if self._file is None:
                return new
            moved = self._stored()
        keep = [
            row
            for row, (name, slot) in enumerate(zip(moved["group"], moved["slot"]))
            if name != group or slot not in slots
        ]
        both = concatenate_datasets([moved.select(keep), new.cast(moved.features)])
        places = {name: index for index, name in enumerate(self._groups)}
        order = sorted(range(len(both)), key=list(zip(map(places.get, both["group"]), both["slot"])).__getitem__)
        return both.select(order)

    def _stored(self) -> Dataset:
        if self._cached is None:
            path = self.directory / str(self._file)
            if not path.is_file():
                raise RunError(f"{path}: named in state.json but not there. Delete the buffer and fill it again.")
            with quiet():
                self._cached = Dataset.from_parquet(str(path), cache_dir=str(self.directory / "cache"))
        return self._cached

    def _write(self, rows: Dataset) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        before, name = self._file, self._file_name()
        temporary = self.directory / (name + ".part")
        rows.to_parquet(str(temporary))
        temporary.replace(self.directory / name)
        if before is not None:
            self._keep_before(before)
        self._commit(name)
        self._cached = None
        if before is not None:
            (self.directory / before).unlink(missing_ok=True)
        shutil.rmtree(self.directory / "cache", ignore_errors=True)

    def _keep_before(self, name: str) -> None:
        """Copy the buffer as it is on disk into a folder of its own, whole at any moment."""
        folder = self.directory / "before"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(self.directory / name, folder / (name + ".part"))
        (folder / (name + ".part")).replace(folder / name)
        write_text(folder / "state.json", (self.directory / "state.json").read_text(encoding="utf-8"))
        for file in folder.glob("*.parquet"):
            if file.name != name:
                file.unlink()

    def _file_name(self) -> str:
        return f"rows-{self.seen:012d}.parquet"

    def _settings(self) -> dict[str, Any]:
        """What a buffer that is opened again must have been made with."""
        return {"version": _VERSION, "size": self.size, "policy": self.policy, "seed": self.seed}

    def _commit(self, name: str) -> None:
        state = {
            **self._settings(),
            "seen": self.seen,
            "file": name,
            "groups": {group: reservoir.state_dict() for group, reservoir in self._groups.items()},
        }
        write_text(self.directory / "state.json", json.dumps(state, indent=1) + "\n")
        self._file = name

    def _reopen(self) -> None:
        """Take the state from disk; an empty buffer where there is none."""
        self.seen, self._file, self._groups, self._cached = 0, None, {}, None
        if not (self.directory / "state.json").is_file():
            return
        path = self.directory / "state.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            for name, value in self._settings().items():
                if state[name] != value:
                    raise RunError(
                        f"{path}: made with {name} {state[name]}, but {value} is asked for now. "
                        "Use the same settings, or another directory."
                    )
            for group, saved in state["groups"].items():
                self._groups[group] = Reservoir(int(saved["capacity"]), 0)
                self._groups[group].load_state_dict(saved)
            self.seen, self._file = int(state["seen"]), str(state["file"])
        except RunError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error}). Delete the buffer and fill it again.") from error
        self._stored()
