"""Presets: what goes first, that every one can be planned, and that each runs, on a tiny model."""

from pathlib import Path

import pytest
import yaml
from run_kit import response_rows, write_lines

from retain import presets
from retain.config import dump, parse, read
from retain.errors import ConfigError
from retain.pipeline import plan, run

ROOT = Path(__file__).parents[1]
TASK = {"tasks": ["examples/data/tickets"]}


@pytest.mark.parametrize("name", presets.names())
def test_is_complete_and_says_what_it_is_for(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert presets.text(name).startswith("# ")
    assert presets.about(name).endswith(".")
    planned = plan(parse(TASK | {"preset": name}))
    assert len(planned.stack.methods) == len(planned.config.methods)


def test_what_is_given_goes_first():
    made = parse(TASK | {"preset": "small", "train": {"learning_rate": 0.5, "max_steps": 3}})
    assert made.train == {"learning_rate": 0.5, "max_steps": 3}
    assert made.methods == yaml.safe_load(presets.text("small"))["methods"]
    own = parse(TASK | {"preset": "small", "methods": ["lora"]})
    assert own.methods == ["lora"]
    assert own.train == yaml.safe_load(presets.text("small"))["train"]
    assert parse(yaml.safe_load(dump(made))) == made


def test_on_the_command_line_and_with_overrides(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(TASK))
    made = read(path, ["methods.0.lora.r=3"], "small")
    assert made.methods[0] == {"lora": {"r": 3}}
    assert read(path, ["preset=small"]).methods == parse(TASK | {"preset": "small"}).methods
    path.write_text(yaml.safe_dump(TASK | {"preset": "rich"}))
    assert read(path, ["preset=small"]).methods == parse(TASK | {"preset": "small"}).methods


def test_unknown_preset_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"preset: unknown 'smal'\. Did you mean 'small'\?"):
        parse(TASK | {"preset": "smal"})


@pytest.mark.parametrize("name", presets.names())
def test_runs(name, tiny_cache, tmp_path):
    rows = write_lines(tmp_path / "task.jsonl", response_rows(24, 0))
    values = {"preset": name, "tasks": [str(rows), str(rows)], "output": str(tmp_path / "run")}
    values["probes"] = {"limit": 2, "task_limit": 2}
    values["train"] = {"max_steps": 3, "max_length": 96, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    results = run(parse(values), say=lambda line: None)
    assert len(results.stages) == 3
