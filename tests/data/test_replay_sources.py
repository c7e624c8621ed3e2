"""Where replayed rows come from."""

import json
import math
from types import SimpleNamespace

import pytest
from datasets import Dataset

from retain.data.replay_sources import Part, SourceConfig, check_rows, joined_parts, names, read, some, weighted
from retain.errors import DataError


def write(path, count, key="response"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"ask {i}", key: f"say {i}"}) + "\n" for i in range(count)))
    return str(path)


def listed(*weights, temperature=None):
    sources = [SourceConfig(data=f"{number}.jsonl", weight=weight) for number, weight in enumerate(weights)]
    return SimpleNamespace(sources=sources, temperature=temperature)


def parts(*sizes):
    return [Part(str(number), [None] * size) for number, size in enumerate(sizes)]


def test_names_are_short_and_differ():
    found = names(
        [
            *(SourceConfig(data=data) for data in ("a/general.jsonl", "b/general.csv", "poems/train.jsonl", "self")),
            *(SourceConfig(data=data) for data in ("owner/set:config", "some/folder")),
            SourceConfig(data="c.jsonl", name="mine"),
        ]
    )
    assert found == ["general", "general-2", "poems", "self", "set", "folder", "mine"]


@pytest.mark.parametrize(
    ("suffix", "streaming"), [("jsonl", False), ("csv", False), ("parquet", False), ("jsonl", True)]
)
def test_every_kind_of_file_is_read(suffix, streaming, tmp_path):
    path = tmp_path / f"old.{suffix}"
    rows = Dataset.from_list([{"prompt": f"ask {i}", "response": f"say {i}"} for i in range(30)])
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](str(path))
    source = SourceConfig(data=str(path), streaming=streaming)
    check_rows(source)
    found = read(source, 0)
    said = [row["completion"][0]["content"] for row in found]
    assert sorted(said) == sorted(f"say {i}" for i in range(30))
    few = read(SourceConfig(data=str(path), streaming=streaming, limit=7), 0)
    assert len(few) == len({row["completion"][0]["content"] for row in few}) == 7
    assert few.to_list() == read(SourceConfig(data=str(path), streaming=streaming, limit=7), 0).to_list()
    assert few.to_list() != read(SourceConfig(data=str(path), streaming=streaming, limit=7), 1).to_list()


def test_a_stream_is_kept_up_to_a_number_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("retain.data.replay_sources.STREAMED", 5)
    assert len(read(SourceConfig(data=write(tmp_path / "a.jsonl", 20), streaming=True), 0)) == 5
    assert len(read(SourceConfig(data=write(tmp_path / "a.jsonl", 20)), 0)) == 20


def test_columns_have_other_names(tmp_path):
    path = write(tmp_path / "old.jsonl", 3, "output")
    with pytest.raises(DataError):
        check_rows(SourceConfig(data=path))
    source = SourceConfig(data=path, columns={"response": "output"})
    check_rows(source)
    assert read(source, 0)[0]["completion"][0]["content"] == "say 0"


def test_missing_rows_are_found_early(tmp_path):
    with pytest.raises(DataError, match="no such file") as caught:
        check_rows(SourceConfig(data=str(tmp_path / "gone.jsonl")))
    assert "\n" not in str(caught.value)
    check_rows(SourceConfig(data="self"))


def test_weights_are_of_sources_unless_a_temperature_brings_sizes_in():
    assert weighted(parts(10, 90), listed(None, None)) == ((1.0, 1.0), 1.0)
    assert weighted(parts(10, 90), listed(2, None)) == ((2.0, 1.0), math.inf)
    assert weighted(parts(10, 90), listed(2, None, temperature=3)) == ((2.0, 1.0), 3)
    assert weighted(parts(10, 90)[1:], listed(2, 5)) == ((5.0,), math.inf), "a source without rows is left out"


@pytest.mark.parametrize(("tasks", "share"), [(10, 10 / 40), (30, 0.25), (600, 0.25), (4, 4 / 34)])
def test_earlier_tasks_give_a_quarter_at_most(tasks, share):
    config = SimpleNamespace(sources=[], temperature=None)
    given = [Part("old", Dataset.from_dict({"x": range(30)})), Part("tasks", Dataset.from_dict({"x": range(tasks)}))]
    _, sources = joined_parts(given, *weighted(given, config))
    assert sources.shares([1.0] * (30 + tasks))[1] == pytest.approx(share)
    alone, sources = joined_parts(given[1:], *weighted(given[1:], config))
    assert (len(alone), sources.names, sources.weights) == (tasks, ("tasks",), (1.0,))


def test_parts_become_one_with_their_origin():
    given = [
        Part("a", Dataset.from_dict({"x": [1, 2], "y": [0, 0]})),
        Part("none", []),
        Part("b", Dataset.from_dict({"x": [3]})),
    ]
    rows, sources = joined_parts(given, (1.0, 2.0, 3.0), 1.0)
    assert rows.to_dict() == {"x": [1, 2, 3]}
    assert (sources.names, sources.origin.tolist(), sources.weights) == (("a", "b"), [0, 0, 1], (1.0, 3.0))
    assert sources.sentence() == "a 2, b 1"
    assert joined_parts([Part("a", [])], (1.0,), 1.0) == (None, None)


def test_some_rows_are_a_draw_in_their_order():
    rows = Dataset.from_dict({"x": list(range(50))})
    few = some(rows, 8, 1)["x"]
    assert list(few) == sorted(few)
    assert list(few) != list(range(8))
    assert some(rows, None, 1) is some(rows, 50, 1) is rows
