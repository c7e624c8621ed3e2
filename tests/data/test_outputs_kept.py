"""Rows with their outputs: a uniform sample, the same from disk, from a checkpoint and from several processes."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from retain.data.outputs import ALWAYS, Stored, StoredOutputs
from retain.errors import RunError


def row(number, key, positions=2, k=3, task=1):
    random = np.random.default_rng(number)
    return Stored(
        key,
        task,
        np.array([number, 5, 6, 7], np.int32),
        np.array([-100, -100, 6, 7], np.int32)[: 4 if positions else 2],
        random.integers(0, 99, (positions, k)).astype(np.int32),
        -random.random((positions, k)).astype(np.float16),
    )


def numbers(kept):
    return [int(r.input_ids[0]) for r in kept.rows]


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one.rows, other.rows):
        assert (a.key, a.task) == (b.key, b.task)
        for name in ("input_ids", "labels", "top_ids", "log_probs"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert np.array_equal(x, y)


def test_every_row_of_a_stream_has_the_same_chance():
    """χ² over 2000 streams of 12 rows into 4 places, some offered one by one and some in parts."""
    random, trials, counts = np.random.default_rng(3), 2000, np.zeros(12)
    for trial in range(trials):
        kept, keys = StoredOutputs(4), random.random(12)
        parts = np.split(np.arange(12), [1, 3, 7] if trial % 2 else range(1, 12))
        for part in parts:
            kept.offer([row(i, keys[i]) for i in part if kept.keeps(keys[i])])
        counts[numbers(kept)] += 1
    expected = trials * 4 / 12
    variance = trials * (1 / 3) * (2 / 3)
    statistic = float(((counts - expected) ** 2).sum() / variance * 11 / 12)
    assert counts.sum() == trials * 4
    assert statistic < 31.3, "11 degrees of freedom, 0.1 %"


def test_who_offers_first_does_not_matter():
    rows = [row(i, key) for i, key in enumerate(np.random.default_rng(0).random(20))]
    one, other = StoredOutputs(6), StoredOutputs(6)
    one.offer(rows)
    for part in (rows[13:], rows[:5], rows[5:13]):
        other.offer(part)
    same(one, other)
    assert numbers(one) == sorted(range(20), key=lambda i: rows[i].key)[:6]


def test_some_rows_are_always_kept():
    kept = StoredOutputs(2, [row(i, ALWAYS, task=0) for i in range(5)])
    kept.offer([row(10 + i, 0.1 * i) for i in range(4)])
    assert numbers(kept) == [0, 1, 2, 3, 4, 10, 11]
    assert not kept.keeps(0.15)
    assert kept.keeps(0.05)
    none = StoredOutputs(0, [row(0, ALWAYS)])
    assert not none.keeps(0.0)
    none.offer([row(1, 0.0)])
    assert numbers(none) == [0]


def test_disk_and_checkpoint_give_back_every_bit(tmp_path):
    kept = StoredOutputs(4, [row(7, ALWAYS, task=0), row(1, 0.5, positions=1), row(2, 0.25, positions=5)])
    path = tmp_path / "a" / "01.parquet"
    kept.save(path)
    assert not list(path.parent.glob("*.part"))
    same(StoredOutputs.load(path, 4), kept)
    same(StoredOutputs.from_tensors(kept.tensors(), 4), kept)
    empty = StoredOutputs(4)
    empty.save(path)
    same(StoredOutputs.load(path, 4), empty)
    same(StoredOutputs.from_tensors(empty.tensors(), 4), empty)


def test_an_entry_costs_six_bytes(tmp_path):
    rows = [row(i, 0.001 * i, positions=40, k=64) for i in range(50)]
    StoredOutputs(50, rows).save(tmp_path / "rows.parquet")
    tables = pq.read_metadata(tmp_path / "rows.parquet").row_group(0)
    outputs = sum(tables.column(i).total_uncompressed_size for i in range(tables.num_columns))
    assert outputs < 1.3 * 6 * 50 * 40 * 64


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RunError, match=r"rows\.parquet: damaged") as caught:
        StoredOutputs.load(tmp_path / "rows.parquet", 4)
    assert "\n" not in str(caught.value)
