"""`retain plan`: what is checked, what is shown, and how it looks on a narrow terminal."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from run_kit import settings, write_config

from retain.cli import main
from retain.config import parse
from retain.models import machine
from retain.rundir import RunDirectory


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Runs the command at 80 columns in an empty folder; gives what it printed."""

    def call(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["retain", "plan", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return call


def config(shop: Path, folder: Path, **changes) -> str:
    values = settings(shop, Path("runs/here"), probes={"reference": [str(shop / "probes.jsonl")]}, **changes)
    return str(write_config(folder.parent / f"{folder.name}.yaml", values))


def test_memory_time_and_steps_come_before_the_settings(shop, planned, tmp_path):
    text = planned(config(shop, tmp_path))
    shown, all_settings = text.split("All settings:\n")
    for part in ("24", "weights", "activations", "in all", "free here", "learning count", "asking the probes 3 times"):
        assert part in shown
    assert "GiB" in shown
    assert "replay" in shown
    assert yaml.safe_load(all_settings)["tasks"][1]["data"] == str(shop / "which")
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_tables_fit_80_columns_and_paths_stay_whole(shop, planned, tmp_path):
    shown = planned(config(shop, tmp_path)).split("All settings:\n")[0].splitlines()
    tests = str(shop / "count" / "test.jsonl")
    assert any(tests in line for line in shown), "a path can be copied"
    assert all(len(line) <= 80 for line in shown if str(shop) not in line)


def test_it_warns_when_the_memory_is_not_there(shop, planned, tmp_path, monkeypatch):
    file = config(shop, tmp_path, methods=["none"])
    assert "not fit" not in planned(file)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 2**20)
    shown = planned(file)
    assert "It will probably not fit." in shown
    assert "1. train.gradient_checkpointing=true" in shown
    assert "`lora`" in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "no/such-model"}, "no/such-model"),
        ({"probes": {"reference": ["nowhere.jsonl"]}}, "nowhere.jsonl"),
        ({"old": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"train": {"optim": "nothing"}}, "train: trl.SFTConfig"),
        ({"probes": {"reference": ["core"], "limit": 1}}, "perplexity needs at least 2 for an interval"),
    ],
)
def test_what_a_run_would_stumble_over_is_found(changes, said, shop, tmp_path, monkeypatch, capsys):
    values = settings(shop, tmp_path / "run") | changes
    monkeypatch.setattr(sys, "argv", ["retain", "plan", str(write_config(tmp_path / "c.yaml", values))])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def refused(monkeypatch, capsys, file) -> str:
    monkeypatch.setattr(sys, "argv", ["retain", "plan", str(file)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_directory_that_a_run_refuses_is_found(shop, tmp_path, monkeypatch, capsys):
    values = settings(shop, tmp_path / "run")
    file = write_config(tmp_path / "c.yaml", values)
    place = RunDirectory(tmp_path / "run")
    place.path.mkdir()
    (place.path / "thesis.tex").write_text("years of work")
    assert "not empty and not a run directory" in refused(monkeypatch, capsys, file)
    (place.path / "thesis.tex").unlink()
    place.begin(parse(values | {"seed": 1}))
    assert "a run with other `seed`" in refused(monkeypatch, capsys, file)
    place.config.unlink()
    place.data.unlink()
    (place.path / "env.json").unlink()
    place.begin(parse(values), {"tasks.count": {"training rows": "others"}})
    assert "training rows of `tasks.count` changed" in refused(monkeypatch, capsys, file)
    place.data.write_text("{}")
    place.items("00-base").parent.mkdir()
    place.items("00-base").write_text("no table")
    assert "damaged item table" in refused(monkeypatch, capsys, file)
    place.items("00-base").unlink()
    place.task("01-count").mkdir(parents=True)
    (place.task("01-count") / "done.json").write_text("{")
    assert "done.json: damaged" in refused(monkeypatch, capsys, file)


def test_too_little_space_is_found(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    file = write_config(tmp_path / "c.yaml", settings(shop, tmp_path / "run"))
    assert "are needed for checkpoints" in refused(monkeypatch, capsys, file)
    assert not (tmp_path / "run").exists()
