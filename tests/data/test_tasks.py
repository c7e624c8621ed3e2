"""Tasks: where the test rows come from, that no prompt is in both, and what the notes say."""

import pytest

from retain.data.tasks import load_task
from retain.errors import ConfigError, DataError


def rows(start, stop):
    return [{"prompt": f"question {i}", "response": f"answer {i}", "answers": [str(i)]} for i in range(start, stop)]


def asked(task):
    return [row["prompt"][0]["content"] for row in task.rows]


def test_a_folder_gives_train_and_test(lines, tmp_path):
    lines("poems/train.jsonl", rows(0, 30))
    lines("poems/test.jsonl", rows(30, 40))
    task = load_task(tmp_path / "poems")
    assert task.name == "poems"
    assert task.form == "response"
    assert task.rows.column_names == ["prompt", "completion"]
    assert len(task.rows) == 30
    assert task.test_rows == rows(30, 40)
    assert task.notes == [f"10 test rows from {tmp_path / 'poems' / 'test.jsonl'}"]


def test_the_dev_file_stands_in_for_a_test_file(lines, tmp_path):
    lines("poems/train.jsonl", rows(0, 30))
    lines("poems/dev.jsonl", rows(30, 40))
    assert len(load_task(tmp_path / "poems").test_rows) == 10


def test_names(lines, tmp_path):
    path = lines("poems/train.jsonl", rows(0, 30))
    assert load_task(path).name == "poems"
    assert load_task(path, name="verse").name == "verse"
    assert load_task(lines("other/song.jsonl", rows(0, 30))).name == "song"


@pytest.mark.parametrize(("share", "most", "expected"), [(0.1, 200, 10), (0.5, 20, 20), (0.001, 200, 1)])
def test_held_out_rows(lines, share, most, expected):
    path = lines("x.jsonl", rows(0, 100))
    task = load_task(path, hold_out=share, hold_out_at_most=most, seed=3)
    assert len(task.test_rows) == expected
    assert len(task.rows) == 100 - expected
    tested = {row["prompt"] for row in task.test_rows}
    assert tested | set(asked(task)) == {f"question {i}" for i in range(100)}
    assert task.notes == [f"no test file: {expected} of 100 rows held out for testing (seed 3)"]
    again = load_task(path, hold_out=share, hold_out_at_most=most, seed=3)
    assert again.test_rows == task.test_rows
    other = load_task(path, hold_out=share, hold_out_at_most=most, seed=4)
    assert other.test_rows != task.test_rows


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(3, 200, 2), (10, 200, 2), (14, 200, 2), (50, 200, 5), (10, 1, 1)]
)
def test_of_texts_two_are_held_out(lines, count, most, expected):
    """One document alone gives no interval."""
    path = lines("x.jsonl", [{"text": f"Ship {i} sailed."} for i in range(count)])
    task = load_task(path, hold_out_at_most=most)
    assert (len(task.test_rows), len(task.rows)) == (expected, count - expected)


def test_nothing_held_out(lines):
    task = load_task(lines("x.jsonl", rows(0, 10)), hold_out=0)
    assert task.test_rows == []
    assert len(task.rows) == 10
    assert "cannot be measured" in task.notes[0]
    with pytest.raises(DataError, match="too few to hold one out"):
        load_task(lines("y.jsonl", rows(0, 1)))


def test_prompts_that_are_tested_leave_the_training_rows(lines, tmp_path):
    same = {"prompt": "  Question\n3 ", "response": "another answer"}
    lines("a/train.jsonl", [*rows(0, 10), same])
    lines("a/test.jsonl", rows(3, 5))
    task = load_task(tmp_path / "a")
    assert asked(task) == [f"question {i}" for i in (0, 1, 2, 5, 6, 7, 8, 9)]
    assert "3 of 11 training rows dropped: their prompt is in the test rows" in task.notes
    lines("b/train.jsonl", rows(0, 2))
    lines("b/test.jsonl", rows(0, 5))
    with pytest.raises(DataError, match="nothing is left"):
        load_task(tmp_path / "b")


def test_copies_of_a_held_out_prompt_are_not_trained_on(lines):
    task = load_task(lines("x.jsonl", rows(0, 10) * 10), hold_out=0.05)
    assert not {row["prompt"] for row in task.test_rows} & set(asked(task))


def test_test_rows_may_have_no_response(lines, tmp_path):
    lines("a/train.jsonl", rows(0, 10))
    lines("a/test.jsonl", [{"prompt": "question 1", "answers": ["1"]}])
    task = load_task(tmp_path / "a")
    assert len(task.rows) == 9
    assert task.test_rows == [{"prompt": "question 1", "answers": ["1"]}]


def test_a_stream(lines, tmp_path):
    lines("a/train.jsonl", rows(0, 30))
    lines("a/test.jsonl", rows(0, 5))
    task = load_task(tmp_path / "a", streaming=True)
    assert len(asked(task)) == 25
    held = load_task(lines("x.jsonl", rows(0, 30)), streaming=True, hold_out_at_most=4)
    assert [row["prompt"] for row in held.test_rows] == [f"question {i}" for i in range(4)]
    assert len(asked(held)) == 26


def test_long_rows_are_counted_or_left_out(lines, tokenizer):
    path = lines("x.jsonl", [*rows(0, 8), {"prompt": "long", "response": "word " * 100}])
    task = load_task(path, tokenizer=tokenizer, max_length=60, hold_out=0)
    assert len(task.rows) == 9
    assert task.notes[-1] == "1 of 9 rows is longer than 60 tokens: cut at the end"
    task = load_task(path, tokenizer=tokenizer, max_length=60, hold_out=0, long="drop")
    assert len(task.rows) == 8
    assert task.notes[-1].endswith("left out")
    with pytest.raises(DataError, match="all 9 rows are longer"):
        load_task(path, tokenizer=tokenizer, max_length=2, hold_out=0, long="drop")


def test_a_mapping(lines, tokenizer):
    path = lines("x.jsonl", [{"q": f"question {i}", "a": "yes"} for i in range(20)])
    task = load_task({"data": path, "name": "n", "columns": {"prompt": "q", "response": "a"}, "limit": 10})
    assert task.name == "n"
    assert len(task.rows) + len(task.test_rows) == 10
    with pytest.raises(ConfigError, match="Did you mean 'columns'"):
        load_task({"data": path, "colums": {}})
    with pytest.raises(ConfigError, match="'data' is missing"):
        load_task({"name": "n"})


@pytest.mark.parametrize("setting", [{"hold_out": 1}, {"hold_out": -0.1}, {"hold_out_at_most": 0}, {"long": "keep"}])
def test_impossible_settings(lines, setting):
    with pytest.raises(ConfigError, match="Allowed"):
        load_task(lines("x.jsonl", rows(0, 10)), **setting)


def test_only_some_rows(lines):
    kinds = [row | {"kind": "odd" if i % 2 else "even"} for i, row in enumerate(rows(0, 20))]
    path = lines("x.jsonl", kinds)
    task = load_task(path, only={"kind": ["odd"]}, hold_out=0.2)
    everything = set(asked(task)) | {row["prompt"] for row in task.test_rows}
    assert everything == {f"question {i}" for i in range(1, 20, 2)}
    assert len(load_task({"data": path, "only": {"kind": ["odd"]}, "limit": 3, "hold_out": 0}).rows) == 3
    assert len(list(load_task(path, only={"kind": ["even"]}, hold_out=0, streaming=True).rows)) == 10
    with pytest.raises(DataError, match=r"only: unknown 'kin'.* Did you mean 'kind'"):
        load_task(path, only={"kin": ["odd"]})
    with pytest.raises(DataError, match="no row has kind in"):
        load_task(path, only={"kind": ["none"]})


def test_the_same_rows_are_asked_again(lines):
    path = lines("x.jsonl", rows(0, 30))
    task = load_task(path, test="same", test_limit=10)
    assert len(task.rows) == 30
    assert len(task.test_rows) == 10
    assert {row["prompt"] for row in task.test_rows} < set(asked(task))
    assert "memory" in task.notes[0]
    with pytest.raises(ConfigError, match="stream"):
        load_task(path, test="same", streaming=True)


def test_no_more_rows_are_held_out_than_are_tested(lines):
    path = lines("x.jsonl", rows(0, 20))
    task = load_task(path, test_limit=1, hold_out=0.5)
    assert (len(task.test_rows), len(task.rows)) == (1, 19)
    assert "1 of 20 rows held out" in task.notes[0]
    assert len(load_task(path, test_limit=15, hold_out=0.5).test_rows) == 10
    assert len(load_task(path, test_limit=3, streaming=True).test_rows) == 3


def test_long_rows_of_a_stream_are_left_out_as_they_come(lines, tokenizer):
    long = {"prompt": "long", "response": "word " * 100}
    path = lines("x.jsonl", [*rows(0, 4), long, *rows(4, 8)])
    given = {"tokenizer": tokenizer, "max_length": 60, "hold_out": 0, "streaming": True}
    task = load_task(path, long="drop", **given)
    assert asked(task) == [f"question {i}" for i in range(8)]
    assert "rows of the stream that are longer than 60 tokens are left out as they come" in task.notes
    assert len(asked(load_task(path, **given))) == 9
    with pytest.raises(DataError, match="all rows are longer"):
        load_task(path, long="drop", **given | {"max_length": 2})
    texts = lines("t.jsonl", [{"text": "short"}, {"text": "word " * 100}])
    assert [row["text"] for row in load_task(texts, long="drop", **given).rows] == ["short"]


def test_leaving_long_rows_out_needs_a_length(lines, tokenizer):
    for given in ({}, {"tokenizer": tokenizer}, {"max_length": 60}):
        with pytest.raises(ConfigError, match="'drop' has no effect without a longest length"):
            load_task(lines("x.jsonl", rows(0, 10)), long="drop", **given)
