"""Rows kept with what a model said about them, for replay of outputs: a uniform sample of a stream, on disk as Parquet.

Every row carries its own outputs, so that rows and outputs cannot be mixed up. Of the rows of tasks those with the
smallest random keys are kept, which is a uniform sample of all that were offered (each of N is there with probability
min(1, size/N)), whatever their order and however many processes offer them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from retain.errors import RunError

#: Key of rows that are always kept.
ALWAYS = -1.0


@dataclass(frozen=True, eq=False)
class Stored:
    """One row with its outputs at the N positions that predict a supervised token.

    Shapes: `input_ids` and `labels` [T] int32, labels −100 where nothing is learned; `top_ids` [N, k] int32 and
    `log_probs` [N, k] float16 of the k likeliest next tokens, in nats. `task` is 0 for rows from before the first task.
    """

    key: float
    task: int
    input_ids: np.ndarray
    labels: np.ndarray
    top_ids: np.ndarray
    log_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.top_ids)


class StoredOutputs:
    """Rows in the order of their keys: those that are always kept, then at most `size` of the tasks'."""

    def __init__(self, size: int, rows: Iterable[Stored] = ()) -> None:
        self.size = size
        self.rows: list[Stored] = []
        self.offer(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def keeps(self, key: float) -> bool:
        """Whether a row with this key would be kept now; if not, it never will be."""
        free = self.size - sum(row.key >= 0 for row in self.rows)
        return key < 0 or free > 0 or (self.size > 0 and key < self.rows[-1].key)

    def offer(self, rows: Iterable[Stored]) -> None:
        """Take in rows and let go of those with the largest keys."""
        merged = sorted([*self.rows, *rows], key=lambda row: row.key)
        kept = sum(row.key < 0 for row in merged)
        self.rows = merged[: kept + self.size]

    def save(self, path: Path) -> None:
        """Write all rows, whole or not at all."""
        columns = {
            "key": pa.array([row.key for row in self.rows], pa.float64()),
            "task": pa.array([row.task for row in self.rows], pa.int32()),
            "input_ids": _lists([row.input_ids for row in self.rows], pa.int32()),
            "labels": _lists([row.labels for row in self.rows], pa.int32()),
            "positions": pa.array([len(row) for row in self.rows], pa.int32()),
            "top_ids": _lists([row.top_ids for row in self.rows], pa.int32()),
            "log_probs": _lists([row.log_probs for row in self.rows], pa.float16()),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        pq.write_table(pa.table(columns), partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, size: int) -> StoredOutputs:
        """The rows of a file.

        Raises:
            RunError: the file is damaged.
        """
        try:
            table = pq.read_table(path)
            columns = [table[name].to_pylist() for name in ("key", "task", "positions")]
            arrays = [
                [np.asarray(entry.values) for entry in table[name]]
                for name in ("input_ids", "labels", "top_ids", "log_probs")
            ]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise RunError(f"{path}: damaged ({error}). Start the task before it again, or a new run.") from error
        return cls(
            size,
            [
                Stored(key, task, ids, labels, top.reshape(n, -1), log_probs.reshape(n, -1))
                for key, task, n, ids, labels, top, log_probs in zip(*columns, *arrays)
            ],
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All rows as tensors, for a checkpoint."""
        whole: dict[str, np.ndarray] = {
            "key": np.array([row.key for row in self.rows], np.float64),
            "task": np.array([row.task for row in self.rows], np.int32),
            "tokens": np.array([len(row.input_ids) for row in self.rows], np.int32),
            "positions": np.array([len(row) for row in self.rows], np.int32),
            "input_ids": _joined([row.input_ids for row in self.rows], np.int32),
            "labels": _joined([row.labels for row in self.rows], np.int32),
            "top_ids": _joined([row.top_ids for row in self.rows], np.int32),
            "log_probs": _joined([row.log_probs for row in self.rows], np.float16),
        }
        return {name: torch.from_numpy(array) for name, array in whole.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], size: int) -> StoredOutputs:
        """What `tensors` gave."""
        flat = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        positions = flat["positions"]
        k = len(flat["top_ids"]) // max(1, int(positions.sum()))
        by_token = [np.split(flat[name], np.cumsum(flat["tokens"])[:-1]) for name in ("input_ids", "labels")]
        by_entry = [np.split(flat[name], np.cumsum(positions * k)[:-1]) for name in ("top_ids", "log_probs")]
        return cls(
            size,
            [
                Stored(float(key), int(task), ids, labels, top.reshape(n, -1), log_probs.reshape(n, -1))
                for key, task, n, ids, labels, top, log_probs in zip(
                    flat["key"], flat["task"], positions, *by_token, *by_entry
                )
            ],
        )


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """A column of lists, without a Python object per number."""
    ends = np.cumsum([0, *(array.size for array in arrays)])
    values = _joined(arrays, kind.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, kind))


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.ravel() for array in arrays)]).astype(dtype)
