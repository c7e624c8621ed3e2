"""What a model has seen, and a general mix without it."""

from __future__ import annotations

import json

import pytest
from advice_kit import invented
from run_kit import carry_out, write_lines

from retain.advice import refresh, seen
from retain.advice.refreshing import replayed, write_rows
from retain.errors import ConfigError, DataError, RunError
from retain.models.load import load_model


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory):
    """A run of one task that replayed eight of its twelve old rows."""
    output = tmp_path_factory.mktemp("seen") / "run"
    changes = {
        "tasks": [str(shop / "count")],
        "methods": [{"lora": {"r": 2}}, {"replay": {"fraction": 0.25, "rows": 8}}],
    }
    carry_out(shop, output, **changes)
    return output


LONG = "It begins in the hills, flows past seven old towns and a lake, and ends in the northern sea."


def mix(path, count: int = 40):
    return write_lines(path / "mix.jsonl", invented(count))


def test_rows_that_were_given_are_not_drawn_again(tmp_path):
    everything = mix(tmp_path)
    first = refresh(str(everything), 10, seed=1)
    assert first == refresh(str(everything), 10, seed=1)
    assert first.rows != refresh(str(everything), 10, seed=2).rows
    used = tmp_path / "used.jsonl"
    write_rows(first, used)
    second = refresh(str(everything), 10, [str(used)], seed=1)
    assert second.used >= 10
    assert not {row["prompt"] for row in first.rows} & {row["prompt"] for row in second.rows}
    assert {tuple(row) for row in second.rows} == {("prompt", "response")}, "rows stay as they are in the mix"
    assert f"10 fresh rows of {first.total}" in second.sentence()


def test_near_repeats_count_as_used_and_are_drawn_once(tmp_path):
    rows = [
        {"prompt": f"Tell me all that you know about the long and cold river {n}", "response": LONG} for n in "abcdefg"
    ]
    rows += [rows[0] | {"prompt": rows[0]["prompt"].upper() + "!"}]
    odd = [{"prompt": word, "response": word[::-1]} for word in ("alpha", "beta", "gamma", "delta")]
    path = write_lines(tmp_path / "mix.jsonl", [*rows, *odd])
    found = refresh(str(path), 5)
    assert found.repeated == 7
    with pytest.raises(DataError, match=r"5 fresh rows of 12 are left .0 used, 7 repeat others., 6 wanted"):
        refresh(str(path), 6)
    given = write_lines(tmp_path / "seen.jsonl", rows[:1])
    assert refresh(str(path), 4, [str(given)]).used == 8


def test_what_a_run_replayed_is_what_it_drew(shop, finished, tmp_path):
    ((name, rows),) = replayed(str(finished))
    assert (name, len(rows)) == ("old", 8)
    drawn = {row["prompt"][-1]["content"] for row in rows}
    old = [json.loads(line) for line in (shop / "old.jsonl").read_text().splitlines()]
    others = write_lines(tmp_path / "mix.jsonl", [*old, *invented(3)])
    fresh = refresh(str(others), 3, [str(finished)])
    assert fresh.used >= 8
    assert not drawn & {row["prompt"] for row in fresh.rows}
    log = (finished / "results.json").read_text()
    assert json.loads(log)["methods"]["replay"]["rows"] == 8


def test_the_rows_of_a_run_are_its_tasks(finished, shop):
    (task,) = seen.samples(str(finished))
    assert (task.name, len(task)) == ("task count", 24)
    assert len(seen.samples(str(finished), 5)[0]) == 5
    model, tokenizer = seen.model_of([str(finished)], None)
    base, _ = load_model(str(shop / "model"))
    ours, theirs = (dict(m.named_parameters())["model.layers.0.self_attn.q_proj.weight"] for m in (model, base))
    assert not ours.equal(theirs), "the model as it is after the run"
    assert tokenizer.chat_template


def test_a_buffer_stands_for_rows_that_are_gone(shop, finished, tmp_path, monkeypatch):
    from retain.data import tasks

    def gone(*args, **kwargs):
        raise DataError("count: no such file or folder.")

    monkeypatch.setattr(tasks, "load_task", gone)
    (kept,) = seen.samples(str(finished))
    assert kept.name.startswith("buffer of")
    assert len(kept) == 24


def test_a_run_without_a_finished_task_is_refused(shop, finished, tmp_path):
    empty = tmp_path / "begun"
    empty.mkdir()
    (empty / "run.yaml").write_text((finished / "run.yaml").read_text())
    with pytest.raises(RunError, match="no task of it is finished"):
        seen.model_of([str(empty)], None)


def test_fewer_than_one_row_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--rows: 0"):
        refresh(str(mix(tmp_path)), 0)
