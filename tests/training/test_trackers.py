"""What a monitor sees goes to the trackers of `report_to`; one that is not there is refused before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run_kit import settings, write_config
from transformers.integrations import integration_utils

from retain import ForgettingMonitor
from retain.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from monitor_kit import TEXTS, habits, host, looks


def test_trackio_keeps_the_forgetting_charts(tmp_path):
    """Read back from the local store that its dashboard reads."""
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    probes = str(habits(tmp_path / "habits.jsonl"))
    monitor = ForgettingMonitor(every=2, probes=[probes], anchors=TEXTS)
    named = {"report_to": "trackio", "project": "watched", "run_name": "one"}
    host("sft", tmp_path / "run", [monitor], max_steps=4, learning_rate=5e-2, **named).train()
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in SQLiteStorage.get_logs("watched", "one"):
        for key, value in entry.items():
            found.setdefault(key, []).append((entry["train/global_step"], value))
    records = looks(tmp_path / "run" / "monitor.jsonl")
    asked = [(r["step"], r["forgetting"]["value"]) for r in records if "forgetting" in r]
    assert [step for step, _ in asked] == [2, 4]
    assert asked[-1][1] > 0
    assert found["train/forgetting/overall"] == asked
    assert found["train/drift/kl"] == [(r["step"], r["kl"]["value"]) for r in records]
    kept = [(r["step"], 100 * r["probes"]["habits"]["score"]["value"]) for r in records if "probes" in r]
    assert found["train/kept/habits"] == [(step, pytest.approx(value)) for step, value in kept]


def refused(monkeypatch, capsys, *words: object) -> str:
    """The one line that a command with bad input says."""
    monkeypatch.setattr(sys, "argv", ["retain", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retain: ")]
    return line


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_tracker_that_is_not_installed_is_one_line(name, command, shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
    values = settings(shop, tmp_path / "run")
    values["train"] |= {"report_to": [name]}
    path = write_config(tmp_path / "run.yaml", values)
    line = refused(monkeypatch, capsys, command, path)
    assert line.startswith(f"retain: {path}: train.report_to: '{name}' is not installed. Run `pip install {name}`")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_nobody_knows(shop, tmp_path, monkeypatch, capsys):
    values = settings(shop, tmp_path / "run")
    values["train"] |= {"report_to": "wandd"}
    line = refused(monkeypatch, capsys, "plan", write_config(tmp_path / "run.yaml", values))
    assert "train.report_to: unknown 'wandd'. Did you mean 'wandb'?" in line
