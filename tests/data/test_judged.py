"""Buffers that judge: the most valuable or the most different rows stay, and the files never disagree."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from scipy.stats import chisquare

from retain.data import judged
from retain.data.buffer import METADATA, Buffer
from retain.data.judged import JudgedBuffer
from retain.data.retention import row_text, text_clusters
from retain.errors import ConfigError, DataError, RunError


def texts(start, stop):
    return Dataset.from_list([{"text": str(i), "other": i} for i in range(start, stop)])


def content(buffer):
    """All rows; a value that is not known is None, which equals itself."""
    rows = buffer.rows().to_list()
    return [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in rows]


def check_whole(buffer):
    """Each row still has what belongs to it, memory and disk agree, and no other file lies about."""
    for row in content(buffer):
        assert row["text"] == str(row["added_at"] - 1)
    again = JudgedBuffer(buffer.directory, buffer.size, buffer.policy, buffer.seed, buffer.clusters)
    assert content(again) == content(buffer)
    state = json.loads((buffer.directory / "state.json").read_text())
    assert [path.name for path in buffer.directory.glob("*.parquet*")] == [state["file"]]


def test_the_lowest_leave_when_it_is_full(tmp_path):
    buffer = JudgedBuffer(tmp_path / "b", 5)
    assert buffer.add(texts(0, 8), "a", values=[5, 1, 4, 1, 5, 9, 2, 6]) == 5
    assert [row["text"] for row in content(buffer)] == ["0", "2", "4", "5", "7"]
    assert buffer.rows().column_names == ["text", *METADATA, "value"]
    assert buffer.rows().cache_files, "rows are to be memory-mapped"
    check_whole(buffer)
    assert buffer.add(texts(8, 11), "b", task="second", values=[0, 7, 4.5]) == 1
    assert sorted(row["value"] for row in content(buffer)) == [5, 5, 6, 7, 9]
    assert buffer.counts() == {"a": 4, "second": 1}
    check_whole(buffer)


def test_values_stay_with_their_rows_through_refresh_eviction_and_more_rows(tmp_path):
    """Against a dictionary, over many rounds of everything, reopened at each."""
    random = np.random.default_rng(0)
    truth: dict[str, float] = {}
    seen = 0
    for round_ in range(25):
        buffer = JudgedBuffer(tmp_path / "b", 12)
        kind = random.integers(3) if len(buffer) > 3 else 0
        if kind == 0:
            count = int(random.integers(1, 9))
            values = random.random(count)
            buffer.add(texts(seen, seen + count), f"s{round_}", values=values)
            truth |= {str(seen + i): float(values[i]) for i in range(count)}
            seen += count
        elif kind == 1:
            values = random.random(len(buffer))
            truth = {row["text"]: float(value) for row, value in zip(content(buffer), values)}
            buffer.refresh(values)
        else:
            buffer.evict(2)
            truth = dict(sorted(truth.items(), key=lambda item: -item[1])[: len(truth) - 2])
        truth = dict(sorted(truth.items(), key=lambda item: -item[1])[:12])
        assert {row["text"]: row["value"] for row in content(buffer)} == truth
        check_whole(buffer)
    assert seen > 30


def test_rows_of_equal_value_are_a_uniform_sample(tmp_path):
    counts = np.zeros(20)
    for seed in range(4):
        buffer = JudgedBuffer(tmp_path / str(seed), 500, seed=seed)
        for start, stop in ((0, 900), (900, 1000), (1000, 2000)):
            buffer.add(texts(start, stop), f"s{start}")  # nothing is known of any
        rows = np.array([int(row["text"]) for row in content(buffer)])
        assert len(set(rows)) == 500
        counts += np.bincount(rows * 20 // 2000, minlength=20)
    assert chisquare(counts).pvalue > 0.001


def test_a_row_without_a_value_stands_in_the_middle(tmp_path):
    buffer = JudgedBuffer(tmp_path / "b", 4)
    buffer.add(texts(0, 4), "a", values=[0.0, 0.1, 5.0, 6.0])
    buffer.add(texts(4, 6), "b")
    assert {row["text"] for row in content(buffer)} == {"2", "3", "4", "5"}
    check_whole(buffer)


TOPICS = {
    "sea": "ships sail over the cold northern sea with sails and anchors",
    "body": "the heart pumps blood and the lungs breathe air in the body",
    "sum": "add seven and eight then multiply the sum by nine",
}


def topical(numbers):
    """Rows of three topics in very unequal numbers."""
    random = np.random.default_rng(1)
    rows = []
    for topic, number in numbers.items():
        for _ in range(number):
            said = random.permutation(TOPICS[topic].split())[1:]  # in any order, without one of the words
            rows.append({"text": " ".join(said), "topic": topic})
    return rows


def test_diversity_keeps_every_cluster(tmp_path):
    rows = topical({"sea": 200, "body": 12, "sum": 8})
    order = np.random.default_rng(0).permutation(len(rows))
    kinds, counts = {row["text"]: row["topic"] for row in rows}, {}
    for name, buffer in (
        ("diverse", JudgedBuffer(tmp_path / "d", 30, "diversity", clusters=3)),
        ("uniform", Buffer(tmp_path / "u", 30)),
    ):
        buffer.add([rows[i] for i in order], "s")
        assert len(buffer) == 30
        counts[name] = Counter(kinds[row["text"]] for row in content(buffer))
    assert min(counts["diverse"][topic] for topic in TOPICS) >= 7
    assert counts["uniform"]["sea"] > 20, "what a uniform sample would have kept"


def test_diversity_over_several_calls(tmp_path):
    """A rare topic that came first is still there after many rows of another."""
    buffer = JudgedBuffer(tmp_path / "d", 20, "diversity", clusters=3)
    buffer.add(topical({"sum": 6}), "first")
    buffer.add(topical({"sea": 100}), "second")
    buffer.add(topical({"body": 100}), "third")
    assert len(buffer) == 20
    assert buffer.counts() == {"first": 6, "second": 7, "third": 7}
    again = JudgedBuffer(tmp_path / "d", 20, "diversity", clusters=3)
    assert content(again) == content(buffer)


def test_clusters_are_a_function_of_the_texts():
    rows = topical({"sea": 20, "body": 20, "sum": 20})
    found = text_clusters([row["text"] for row in rows], 3, 0)
    assert np.array_equal(found, text_clusters(iter([row["text"] for row in rows]), 3, 0))
    pairs = {(row["topic"], cluster) for row, cluster in zip(rows, found)}
    assert len(pairs) == 3, "each topic is one cluster"
    assert len(set(text_clusters(["same"] * 9 + ["other thing"], 5, 0))) == 2
    chinese = ["深度学习模型", "模型深度学习", "今天天气很好", "天气今天真好"]
    groups = text_clusters(chinese, 2, 0)
    assert groups[0] == groups[1] != groups[2] == groups[3]


def test_text_of_a_row():
    chat = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    assert row_text(chat) == "q\na"
    assert row_text({"messages": [{"role": "user", "content": "m"}, {"role": "assistant", "content": None}]}) == "m"
    assert row_text({"text": "t"}) == "t"


@pytest.mark.parametrize("policy", ["priority", "diversity"])
def test_parts_streams_and_lists(tmp_path, policy, monkeypatch):
    """Rows are judged in parts, so that not all of a large set are held; the kind of the set changes nothing."""
    monkeypatch.setattr(judged, "PART", 16)
    rows = topical({"sea": 30, "sum": 10})
    kinds = {
        "dataset": Dataset.from_list(rows),
        "stream": IterableDataset.from_generator(lambda: iter(rows)),
        "list": rows,
    }
    values = np.random.default_rng(0).random(40) if policy == "priority" else None
    found = {}
    for name, one in kinds.items():
        buffer = JudgedBuffer(tmp_path / name, 12, policy, clusters=4)
        buffer.add(one, "s", values=values)
        found[name] = content(buffer)
        assert buffer.seen == 40
    assert found["dataset"] == found["stream"] == found["list"]
    if values is not None:
        assert sorted(row["value"] for row in found["list"]) == pytest.approx(sorted(values)[-12:])


@pytest.mark.parametrize("change", ["add", "refresh", "evict"])
@pytest.mark.parametrize("moment", ["write_text", "copyfile"])
def test_killed_while_writing(tmp_path, monkeypatch, change, moment):
    buffer = JudgedBuffer(tmp_path / "b", 5)
    buffer.add(texts(0, 9), "a", values=range(9))
    before = content(buffer)

    def killed(*arguments):
        raise KeyboardInterrupt

    action = {
        "add": lambda: buffer.add(texts(9, 30), "b", values=range(9, 30)),
        "refresh": lambda: buffer.refresh(range(5)),
        "evict": lambda: buffer.evict(2),
    }[change]
    with monkeypatch.context() as patch:
        patch.setattr("retain.data.buffer.write_text" if moment == "write_text" else "shutil.copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            action()
    assert content(buffer) == content(JudgedBuffer(tmp_path / "b", 5)) == before
    action()
    twin = JudgedBuffer(tmp_path / "twin", 5)
    twin.add(texts(0, 9), "a", values=range(9))
    {
        "add": lambda: twin.add(texts(9, 30), "b", values=range(9, 30)),
        "refresh": lambda: twin.refresh(range(5)),
        "evict": lambda: twin.evict(2),
    }[change]()
    assert content(buffer) == content(twin)


@pytest.mark.parametrize("policy", ["reservoir", "balanced", "priority", "diversity"])
def test_what_was_there_before_the_last_rows(tmp_path, policy):
    """A full buffer gives rows away; a run that must go back finds them."""
    kind = JudgedBuffer if policy in JudgedBuffer.policies else Buffer
    buffer = kind(tmp_path / "b", 10, policy)
    assert len(buffer.before("a")) == 0
    buffer.add(texts(0, 30), "a")
    assert len(buffer.before("a")) == 0
    first = content(buffer)
    assert content(buffer.before("b")) == first
    buffer.add(texts(30, 90), "b")
    assert content(buffer.before("c")) == content(buffer) != first
    reopened = kind(tmp_path / "b", 10, policy)
    assert content(reopened.before("b")) == first
    if policy == "priority":
        second = content(buffer)
        buffer.refresh(np.arange(10.0))
        buffer.add(texts(90, 95), "c", values=[50.0] * 5)
        assert [r["text"] for r in content(buffer.before("c"))] == [r["text"] for r in second]


def test_mistakes_are_said(tmp_path):
    with pytest.raises(ConfigError, match="Allowed: diversity, priority"):
        JudgedBuffer(tmp_path, 5, "reservoir")
    with pytest.raises(ConfigError, match="clusters"):
        JudgedBuffer(tmp_path, 5, "diversity", clusters=0)
    buffer = JudgedBuffer(tmp_path / "p", 5)
    for values in ([1.0], [1.0] * 9):
        with pytest.raises(DataError, match="one for each"):
            buffer.add(texts(0, 8), "s", values=values)
    assert len(buffer) == buffer.seen == 0
    buffer.add(texts(0, 4), "s", values=[1, 2, 3, 4])
    with pytest.raises(DataError, match="one for each"):
        buffer.refresh([1.0])
    with pytest.raises(ConfigError, match="not all"):
        buffer.evict(4)
    diverse = JudgedBuffer(tmp_path / "d", 5, "diversity", clusters=3)
    diverse.add(texts(0, 3), "s")
    for action in (
        lambda: diverse.refresh([1, 2, 3]),
        lambda: diverse.evict(1),
        lambda: diverse.add([], "s", values=[]),
    ):
        with pytest.raises(ConfigError, match="'priority' only"):
            action()
    with pytest.raises(RunError, match="clusters"):
        JudgedBuffer(tmp_path / "d", 5, "diversity", clusters=4)
    with pytest.raises(DataError, match="cannot join"):
        buffer.add([{"messages": [{"role": "user", "content": "q"}]}], "s")
    assert buffer.add([], "t") == 0
    assert re.fullmatch(r"rows-0+4\.parquet", next((tmp_path / "p").glob("*.parquet")).name)
