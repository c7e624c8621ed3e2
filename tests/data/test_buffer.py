"""The buffer: inclusion probabilities, reopening, crashes, and settings that do not fit."""

import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from scipy.stats import chisquare

from retain.data.buffer import METADATA, Buffer
from retain.errors import ConfigError, DataError, RunError


def texts(start, stop):
    return Dataset.from_list([{"text": str(i), "other": i} for i in range(start, stop)])


def content(buffer):
    return buffer.rows().to_list()


def test_everything_is_there_until_it_is_full(tmp_path):
    buffer = Buffer(tmp_path / "b", size=10)
    assert len(buffer) == 0
    assert buffer.counts() == {}
    with pytest.raises(DataError, match="empty"):
        buffer.rows()
    assert buffer.add(texts(0, 6), "old.jsonl", task="first") == 6
    assert content(buffer)[5] == {"text": "5", "source": "old.jsonl", "task": "first", "added_at": 6}
    assert buffer.rows().column_names == ["text", *METADATA]
    assert buffer.rows().cache_files, "rows are to be memory-mapped"
    buffer.add(texts(6, 40), "new.jsonl")
    assert len(buffer) == 10
    assert sum(buffer.counts("source").values()) == 10
    assert [row["text"] == str(row["added_at"] - 1) for row in content(buffer)] == [True] * 10
    assert [path.name for path in (tmp_path / "b").glob("*.parquet*")] == ["rows-000000000040.parquet"]


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_reopening_changes_nothing(tmp_path, policy):
    parts = [
        (texts(0, 13), "a"),
        (texts(13, 14), "b"),
        (texts(14, 60), "a"),
        (texts(60, 75), "c"),
        (texts(75, 90), "b"),
    ]
    whole = Buffer(tmp_path / "whole", 12, policy, seed=5)
    for rows, task in parts:
        whole.add(rows, task)
        Buffer(tmp_path / "parts", 12, policy, seed=5).add(rows, task)
    reopened = Buffer(tmp_path / "parts", 12, policy, seed=5)
    assert content(reopened) == content(whole)
    assert reopened.seen == whole.seen == 90


def test_the_size_of_a_call_changes_nothing(tmp_path):
    once, often = Buffer(tmp_path / "once", 7), Buffer(tmp_path / "often", 7)
    once.add(texts(0, 30), "s")
    for start in range(0, 30, 3):
        often.add(texts(start, start + 3), "s")
    assert content(once) == content(often)


def test_streams_and_lists_are_like_datasets(tmp_path):
    kinds = {
        "dataset": texts(0, 30),
        "stream": IterableDataset.from_generator(lambda: iter({"text": str(i)} for i in range(30))),
        "list": [{"text": str(i), "more": None} for i in range(30)],
    }
    found = {}
    for name, rows in kinds.items():
        buffer = Buffer(tmp_path / name, 7)
        buffer.add(rows, "s")
        found[name] = content(buffer)
    assert found["dataset"] == found["stream"] == found["list"]


def test_each_row_has_the_same_chance(tmp_path):
    """P(row is in) = size/N wherever in the stream it stood: χ² over blocks of rows, several calls and seeds."""
    counts, size, number = np.zeros(20), 500, 2000
    for seed in range(4):
        buffer = Buffer(tmp_path / str(seed), size, seed=seed)
        for start, stop in ((0, 900), (900, 1000), (1000, number)):
            buffer.add([{"text": str(i)} for i in range(start, stop)], "s")
        rows = np.array([int(row["text"]) for row in content(buffer)])
        assert len(set(rows)) == size
        counts += np.bincount(rows * 20 // number, minlength=20)
    # Draws without replacement vary less than a multinomial: χ² is too small on average, never too large.
    assert chisquare(counts).pvalue > 0.001


def test_balanced_gives_each_task_its_share(tmp_path):
    buffer = Buffer(tmp_path / "b", 12, "balanced")
    buffer.add(texts(0, 100), "big")
    assert buffer.counts() == {"big": 12}
    buffer.add(texts(100, 103), "small")
    assert buffer.counts() == {"big": 6, "small": 3}
    buffer.add(texts(200, 300), "third")
    assert buffer.counts() == {"big": 4, "small": 3, "third": 4}
    buffer.add(texts(300, 400), "small")
    assert buffer.counts() == {"big": 4, "small": 4, "third": 4}
    assert all(row["task"] == "big" for row in content(buffer) if int(row["text"]) < 100)


def test_balanced_keeps_a_uniform_sample_of_each_task(tmp_path):
    counts = np.zeros(15)
    for seed in range(4):
        buffer = Buffer(tmp_path / str(seed), 600, "balanced", seed=seed)
        buffer.add([{"text": str(i)} for i in range(1000)], "a")
        buffer.add([{"text": "x"} for i in range(4)], "b")
        buffer.add([{"text": str(i)} for i in range(1000, 1500)], "a")
        rows = np.array([int(row["text"]) for row in content(buffer) if row["task"] == "a"])
        assert len(set(rows)) == 300
        counts += np.bincount(rows // 100, minlength=15)
    assert chisquare(counts).pvalue > 0.001


def test_chats_come_back_as_they_were(tmp_path):
    rows = [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"q{i}"}],
            "completion": [{"role": "assistant", "content": "a"}],
        }
        for i in range(3)
    ]
    buffer = Buffer(tmp_path / "b", 10)
    buffer.add(rows[:2], "s")
    buffer.add(Dataset.from_list(rows[2:]), "s")
    assert [{name: row[name] for name in ("prompt", "completion")} for row in content(buffer)] == rows


def test_forms_do_not_mix(tmp_path):
    buffer = Buffer(tmp_path / "b", 10)
    with pytest.raises(DataError, match="cannot be replayed"):
        buffer.add([{"question": "q"}], "s")
    buffer.add(texts(0, 3), "s")
    before = content(buffer)
    with pytest.raises(DataError, match="cannot join"):
        buffer.add([{"messages": [{"role": "user", "content": "q"}]}], "s")
    assert content(buffer) == before


def test_a_call_that_fails_leaves_the_buffer_as_it_was(tmp_path):
    def broken():
        yield from ({"text": str(i)} for i in range(50))
        raise DataError("line 51: not JSON")

    buffer, twin = Buffer(tmp_path / "b", 5), Buffer(tmp_path / "twin", 5)
    for one in (buffer, twin):
        one.add(texts(0, 20), "s")
    with pytest.raises(DataError, match="line 51"):
        buffer.add(broken(), "s")
    assert buffer.seen == 20
    for one in (buffer, twin):
        one.add(texts(20, 90), "s")
    assert content(buffer) == content(twin)


def test_killed_between_rows_and_state(tmp_path, monkeypatch):
    buffer = Buffer(tmp_path / "b", 5)
    buffer.add(texts(0, 20), "s")
    before = content(buffer)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("retain.data.buffer.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        buffer.add(texts(20, 200), "s")
    assert content(Buffer(tmp_path / "b", 5)) == before


@pytest.mark.parametrize("other", [{"size": 6}, {"seed": 1}, {"policy": "balanced"}])
def test_other_settings_are_refused(tmp_path, other):
    Buffer(tmp_path / "b", 5).add(texts(0, 3), "s")
    with pytest.raises(RunError, match=next(iter(other))):
        Buffer(tmp_path / "b", **{"size": 5, **other})


def test_damage_is_said(tmp_path):
    Buffer(tmp_path / "b", 5).add(texts(0, 3), "s")
    state = tmp_path / "b" / "state.json"
    good = state.read_text()
    for bad in ("{", "{}", good.replace('"version": 1', '"version": 2')):
        state.write_text(bad)
        with pytest.raises(RunError):
            Buffer(tmp_path / "b", 5)
    state.write_text(good)
    (tmp_path / "b" / json.loads(good)["file"]).unlink()
    with pytest.raises(RunError, match="not there"):
        Buffer(tmp_path / "b", 5)


def test_settings(tmp_path):
    with pytest.raises(ConfigError, match="size"):
        Buffer(tmp_path, 0)
    with pytest.raises(ConfigError, match="Allowed: balanced, reservoir"):
        Buffer(tmp_path, 5, "newest")
    small = Buffer(tmp_path / "b", 1, "balanced")
    small.add(texts(0, 2), "a")
    with pytest.raises(DataError, match="Raise buffer"):
        small.add(texts(0, 2), "b")
    assert small.counts() == {"a": 1}
