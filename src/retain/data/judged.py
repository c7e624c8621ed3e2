"""A replay buffer on disk that judges every row again when others come: the most valuable rows, or rows spread out.

The files, and what a kill does to them, are those of `retain.data.buffer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from retain.data.buffer import Buffer
from retain.data.json_rows import quiet
from retain.data.retention import keep
from retain.errors import ConfigError, DataError

POLICIES = ("priority", "diversity")
#: Rows that are judged at a time, beside those that are there.
PART = 10_000


class JudgedBuffer(Buffer):
    """Old rows kept for replay by what they are worth, or by how different they are.

    Args:
        directory, size, seed: as of `Buffer`.
        policy: "priority" keeps the rows of the highest `values`, equal ones by lot. "diversity" keeps the same
            number of rows of each cluster of their text (`retain.data.retention`; the clusters are found anew
            whenever rows come), within a cluster by lot.
        clusters: for "diversity".

    Raises:
        ConfigError, RunError: as `Buffer`.
    """

    policies = POLICIES

    def __init__(
        self, directory: str | Path, size: int = 10_000, policy: str = "priority", seed: int = 0, clusters: int = 20
    ) -> None:
        if clusters < 1:
            raise ConfigError(f"buffer.clusters: {clusters} given. Allowed: 1 or more.")
        self.clusters = clusters
        super().__init__(directory, size, policy, seed)

    def add(
        self,
        rows: Iterable[Mapping[str, Any]],
        source: str,
        task: str | None = None,
        values: Sequence[float] | np.ndarray | None = None,
    ) -> int:
        """Offer rows, in order, and write what is kept of them and of those that were there.

        Args:
            rows, source, task: as of `Buffer.add`.
            values: for "priority", what each row is worth; NaN, or None for all, where that is not known (such a row
                counts as the mean of the others).

        Returns:
            How many of them are in the buffer now.

        Raises:
            DataError: rows of no trainable form, or of another form than those already there; more or fewer values
                than rows.
            ConfigError: values for "diversity".
        """
        if values is not None:
            self._only_priority("values")
        return self._whole(lambda: self._add_judged(rows, source, source if task is None else task, values))

    def refresh(self, values: Sequence[float] | np.ndarray) -> None:
        """Give the stored rows new values, in the order of `rows`; no row is lost by this.

        Raises:
            ConfigError: the policy is not "priority".
            DataError: more or fewer values than rows.
        """
        self._only_priority("refresh")
        if len(values) != len(self):
            raise DataError(f"{self.directory}: {len(values)} values given for {len(self)} rows. Give one for each.")
        if len(self):
            self._whole(lambda: self._write(_valued(self._stored().remove_columns("value"), values)))

    def evict(self, number: int) -> int:
        """Remove the rows of the lowest values; gives how many were removed.

        Raises:
            ConfigError: the policy is not "priority", or a number below 0 or of all rows.
        """
        self._only_priority("evict")
        if not 0 <= number < max(1, len(self)):
            raise ConfigError(f"buffer.evict: {number} of {len(self)} rows given. Allowed: 0 or more, not all.")
        if number:
            self._whole(lambda: self._write(self._best(self._stored(), len(self) - number)))
        return number

    # ------------------------------------------------------------------------------------------------ inside

    def _whole(self, change: Callable[[], Any]) -> Any:
        try:
            with quiet():
                return change()
        except BaseException:
            self._reopen()  # memory must not be ahead of the disk
            raise

    def _only_priority(self, what: str) -> None:
        if self.policy != "priority":
            raise ConfigError(f"buffer.{what}: rows have values with the policy 'priority' only, not '{self.policy}'.")

    def _add_judged(self, rows: Any, source: str, task: str, values: Any) -> int:
        """Join a part of the rows to what is there, keep the best of both, go on with the next; write once."""
        before, kept = self.seen, None if self._file is None else self._stored()
        for part in self._parts(rows, source):
            count, first = len(part), self.seen - before
            part = part.add_column("source", [source] * count).add_column("task", [task] * count)
            part = part.add_column("added_at", list(range(self.seen + 1, self.seen + count + 1)))
            if self.policy == "priority":
                own = np.full(count, np.nan) if values is None else values[first : first + count]
                if len(own) < count:
                    raise DataError(f"{source}: {len(values)} values given for more rows. Give one for each.")
                part = _valued(part, own)
            self.seen += count
            kept = self._best(part if kept is None else concatenate_datasets([kept, part.cast(kept.features)]))
        if values is not None and len(values) != self.seen - before:
            raise DataError(f"{source}: {len(values)} values given for {self.seen - before} rows. Give one for each.")
        if kept is None or self.seen == before:
            return 0
        self._write(kept)
        return sum(place > before for place in self._stored()["added_at"])

    def _parts(self, rows: Any, source: str) -> Iterable[Dataset]:
        """At most `PART` rows at a time, with the columns of their form."""
        if isinstance(rows, Dataset):
            names = list(self._check(rows.column_names, source))
            for first in range(0, len(rows), PART):
                yield rows.select(range(first, min(first + PART, len(rows)))).select_columns(names)
            return
        offered = iter(rows)
        names = []
        while some := list(itertools.islice(offered, PART)):
            names = names or list(self._check(list(some[0]), source))
            yield Dataset.from_list([{name: row.get(name) for name in names} for row in some])

    def _best(self, rows: Dataset, number: int | None = None) -> Dataset:
        number = self.size if number is None else number
        if len(rows) <= number:
            return rows
        return rows.select(keep(self.policy, rows, number, self.seed, self.clusters))

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | ({"clusters": self.clusters} if self.policy == "diversity" else {})

    def _file_name(self) -> str:
        """Never that of the file that is replaced: a refresh sees no new row."""
        name = super()._file_name()
        return name if name != self._file else name.replace(".parquet", "-again.parquet")


def _valued(rows: Dataset, values: Any) -> Dataset:
    return rows.add_column("value", np.asarray(values, np.float64).tolist())
