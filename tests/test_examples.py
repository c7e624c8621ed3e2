"""Every example file is valid and runs, on a tiny model."""

from pathlib import Path

import pytest
import yaml
from run_kit import response_rows, write_lines

from retain.config import parse, read
from retain.pipeline import plan, run
from retain.results import load_metrics

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").glob("*.yaml"))
#: The longest of them run for real; every method is in one of these.
WHOLE = ("budget", "everything", "ewc_replay", "interpolate", "l2sp", "watched")


def test_there_is_something_to_try():
    assert set(WHOLE) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_valid_and_says_how_to_run_it(path):
    planned = plan(read(path))
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"retain run examples/{path.name}" in text
    assert planned.config.title == path.stem
    for task in planned.config.tasks:
        assert (ROOT / task.data).is_dir()


@pytest.mark.parametrize("name", WHOLE)
def test_runs(name, tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    old = write_lines(tmp_path / "old.jsonl", response_rows(12, 500))
    values = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8"))
    values |= {"old": str(old), "output": str(tmp_path / "run")}
    values["probes"] = {"limit": 2, "task_limit": 2}
    values["train"] |= {"max_steps": 2, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    if "budget" in values:  # so few items can be sure of nothing less
        values["budget"] = {"lose_at_most": 0.9, "lose_at_most_nats": 9.0, "every": 1, "anchor_count": 4, "tries": 2}
    results = run(parse(values), say=lambda line: None)
    assert [found.feasible for found in results.budgets] == [True] * ("budget" in values)
    assert results.tasks == [Path(task).name for task in values["tasks"]]
    assert (tmp_path / "run" / "report.html").is_file()
    steps = [record["step"] for record in load_metrics(tmp_path / "run") if record["kind"] == "monitor"]
    assert steps == ([0, 2] if "monitor" in values else [])
