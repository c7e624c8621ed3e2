"""The run directory: whose it is, what is finished, and whether there is room."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from tiny import tiny_model, tiny_tokenizer

from retain.config import parse
from retain.errors import RunError
from retain.rundir import BASE, RunDirectory, environment, stage_name

VALUES = {"tasks": ["a.jsonl", "b.jsonl"], "methods": ["ewc"], "train": {"max_steps": 3}}


@pytest.fixture
def place(tmp_path):
    return RunDirectory(tmp_path / "run")


def refused(place, values):
    """The one line that `begin` refuses a configuration with."""
    before = place.config.read_bytes()
    with pytest.raises(RunError) as caught:
        place.begin(parse(values))
    assert place.config.read_bytes() == before
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_names_of_stages():
    assert stage_name(2, "arithmetic") == "02-arithmetic"
    assert stage_name(1, "a/b c:d") == "01-a_b_c_d"
    assert stage_name(12, "räume-1.5_x") == "12-räume-1.5_x"
    assert BASE == "00-base"


def test_begin_writes_the_whole_configuration(place):
    config = parse(VALUES)
    place.begin(config)
    assert place.read_config() == config
    assert "probes" in yaml.safe_load(place.config.read_text())
    env = json.loads((place.path / "env.json").read_text())
    assert {"python", "platform", "versions", "command"} <= set(env)
    place.begin(config)  # the same run goes on


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed"),
        ({"model": "x/y"}, "model"),
        ({"methods": ["l2sp"]}, "methods"),
        ({"train": {"max_steps": 4}}, "train"),
        ({"old": "o.jsonl"}, "old"),
        ({"probes": {"limit": 3}}, "probes"),
        ({"tasks": ["a.jsonl"]}, "tasks"),
        ({"tasks": ["b.jsonl", "a.jsonl"]}, "tasks"),
        ({"tasks": ["a.jsonl", {"data": "b.jsonl", "limit": 2}]}, "tasks"),
    ],
)
def test_another_configuration_is_refused(place, change, word):
    place.begin(parse(VALUES))
    assert f"a run with other `{word}`" in refused(place, VALUES | change)


def test_more_tasks_another_name_and_place_are_the_same_run(place):
    place.begin(parse(VALUES))
    longer = parse(VALUES | {"tasks": [*VALUES["tasks"], "c.jsonl"], "name": "new", "output": "elsewhere"})
    place.begin(longer)
    assert place.read_config() == longer


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty and not a run directory"):
        RunDirectory(tmp_path).begin(parse(VALUES))
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_taken(tmp_path):
    RunDirectory(tmp_path).begin(parse(VALUES))
    assert (tmp_path / "run.yaml").is_file()


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").begin(parse(VALUES))


def test_reading_what_is_no_run_directory(place):
    with pytest.raises(RunError, match=r"no run\.yaml here"):
        place.read_config()


def test_a_damaged_configuration_is_one_line(place):
    place.begin(parse(VALUES))
    place.config.write_text("tasks: [a.jsonl\nseed: {")
    with pytest.raises(RunError, match=r"run\.yaml: damaged") as caught:
        place.read_config()
    assert "\n" not in str(caught.value)


def test_a_task_is_done_when_its_model_is_whole(place, monkeypatch):
    folder = place.task("01-a")
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "model.part").mkdir()
    (folder / "model.part" / "rest").write_text("of a run that was killed")
    assert place.done("01-a") is None
    model = tiny_model(tiny_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr("retain.rundir.write_text", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            place.save_task("01-a", {"model": model.save_pretrained}, {"steps": 3})
    assert place.done("01-a") is None
    assert (folder / "checkpoint-2").is_dir()  # still there to go on from
    place.save_task("01-a", {"model": model.save_pretrained}, {"steps": 3})
    assert place.done("01-a") == {"steps": 3, "kind": "model"}
    assert sorted(f.name for f in folder.iterdir()) == ["done.json", "model"]
    assert not (folder / "model" / "rest").exists()


def test_a_damaged_mark_is_one_line(place):
    place.task("01-a").mkdir(parents=True)
    (place.task("01-a") / "done.json").write_text("{")
    with pytest.raises(RunError, match=r"done\.json: damaged"):
        place.done("01-a")


def test_no_space(place, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=2**30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    place.require_space(2**30)
    with pytest.raises(RunError, match=r"1\.0 GiB are free, about 3\.0 GiB are needed") as caught:
        place.require_space(3 * 2**30)
    assert "\n" not in str(caught.value)
    assert asked[-1] == place.path.parent.absolute()  # the disk that the directory will be on


def test_environment_names_versions():
    versions = environment()["versions"]
    assert {"torch", "transformers", "trl", "datasets"} <= set(versions)


def test_rows_are_compared_by_setting_and_part(place):
    data = {"tasks.a": {"training rows": "x", "test rows": "y"}, "tasks.b": {"training rows": "z"}}
    assert place.begin(parse(VALUES), data) == []
    assert place.begin(parse(VALUES), data) == []
    with pytest.raises(RunError, match=r"test rows of `tasks\.a` changed since this run was made") as caught:
        place.check(parse(VALUES), data | {"tasks.a": {"training rows": "x", "test rows": "other"}})
    assert "\n" not in str(caught.value)
    assert json.loads(place.data.read_text()) == data


def test_rows_may_be_recorded_later(place):
    place.begin(parse(VALUES))  # as for a run that is given the answers of another first
    assert place.begin(parse(VALUES), {"tasks.a": {"training rows": "x"}}) == []
    with pytest.raises(RunError, match="changed"):
        place.begin(parse(VALUES), {"tasks.a": {"training rows": "other"}})


def test_a_check_writes_nothing(place, tmp_path):
    place.check(parse(VALUES))
    assert not place.path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").check(parse(VALUES))
