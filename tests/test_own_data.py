"""A run directory knows its data: the same path with other rows is refused, a finished run included."""

import json
import os

import pytest
from run_kit import choice_rows, response_rows, settings, workshop, write_lines

from retain import demo
from retain.config import parse
from retain.errors import RunError
from retain.pipeline import run
from retain.rundir import RunDirectory


@pytest.fixture
def shop(tmp_path):
    return workshop(tmp_path / "shop")


def carry_out(shop, **changes):
    """Run one short task; returns the results and what was said."""
    values = settings(shop, shop.parent / "run", tasks=[str(shop / "count")]) | changes
    said = []
    return run(parse(values | {"train": values["train"] | {"max_steps": 2}}), said.append), said


def refused(shop, **changes):
    with pytest.raises(RunError) as caught:
        carry_out(shop, **changes)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "count", "offset", "words"),
    [
        ("count/train.jsonl", 23, 0, "training rows of `tasks.count` changed"),
        ("count/test.jsonl", 4, 101, "test rows of `tasks.count` changed"),
        ("old.jsonl", 12, 501, "rows of `old` changed"),
    ],
)
def test_a_finished_run_with_other_rows_is_refused(shop, file, count, offset, words):
    results, _ = carry_out(shop)
    before = (shop / file).read_text()
    again, said = carry_out(shop)
    assert again.matrix == results.matrix
    assert not [line for line in said if "not known" in line]
    write_lines(shop / file, response_rows(count, offset))
    line = refused(shop)
    assert words in line
    assert "Put the earlier ones back, choose another `output:`" in line
    (shop / file).write_text(before)
    carry_out(shop)


def test_a_stopped_run_does_not_go_on_with_other_rows(shop, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("retain.pipeline._Runner._train", stop)
        with pytest.raises(KeyboardInterrupt):
            carry_out(shop)
    write_lines(shop / "count" / "train.jsonl", response_rows(24, 3))
    assert "training rows of `tasks.count` changed" in refused(shop)


def test_one_more_task_is_recorded_beside_the_first(shop):
    carry_out(shop)
    both = [str(shop / "count"), str(shop / "which")]
    results, _ = carry_out(shop, tasks=both)
    assert results.tasks == ["count", "which"]
    write_lines(shop / "which" / "train.jsonl", choice_rows(17))
    assert "`tasks.which`" in refused(shop, tasks=both)


def test_a_stream_with_another_file(shop):
    tasks = [{"data": str(shop / "count"), "streaming": True}]
    carry_out(shop, tasks=tasks)
    os.utime(shop / "count" / "train.jsonl", ns=(1, 1))
    assert "training rows of `tasks.count` changed" in refused(shop, tasks=tasks)


def test_a_directory_without_a_record_still_opens_and_says_so(shop):
    carry_out(shop)
    place = RunDirectory(shop.parent / "run")
    place.data.unlink()
    write_lines(shop / "count" / "train.jsonl", response_rows(23))
    for _ in range(2):  # what was not known does not become known
        _, said = carry_out(shop)
        assert [line.partition(":")[0] for line in said if "not known" in line] == ["tasks.count", "old"]
    place.data.write_text("[")
    assert "data.json: damaged" in refused(shop)


def test_the_record_holds_no_text(shop):
    carry_out(shop)
    text = (shop.parent / "run" / "data.json").read_text()
    assert set(json.loads(text)) == {"tasks.count", "old"}
    assert "one two" not in text


@pytest.mark.parametrize("other", [{"rows": 16}, {"seed": 1}])
def test_a_demo_leaves_the_data_of_another_alone(tmp_path, other):
    first = demo.configs(tmp_path)
    files = sorted((tmp_path / "data").rglob("*.jsonl"))
    before = [file.read_bytes() for file in files]
    with pytest.raises(RunError, match="demo with another seed or number of rows") as caught:
        demo.configs(tmp_path, **other)
    assert "\n" not in str(caught.value)
    assert [file.read_bytes() for file in files] == before
    assert demo.configs(tmp_path) == first
