"""The losses that rows had when they were stored, kept beside the buffers of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retain.errors import RunError


class References:
    """`references.parquet`: what each row is known by → its loss, in nats per supervised token.

    Keyed by the content of a row (`retain.models.row_scores.row_keys`), so that no order and no eviction can bring
    them out of step.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "references.parquet"

    def load(self) -> dict[str, float]:
        """All of them; empty where none were kept yet.

        Raises:
            RunError: the file is damaged.
        """
        if not self.path.is_file():
            return {}
        try:
            table = pq.read_table(self.path)
            return dict(zip(table["key"].to_pylist(), table["loss"].to_pylist()))
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise RunError(
                f"{self.path}: damaged ({error}). Delete it; losses are then compared from now on."
            ) from None

    def save(self, losses: dict[str, float]) -> None:
        """Replace them, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        keys = sorted(losses)
        table = pa.table(
            {"key": pa.array(keys, pa.string()), "loss": pa.array([losses[k] for k in keys], pa.float64())}
        )
        pq.write_table(table, partial)
        os.replace(partial, self.path)
