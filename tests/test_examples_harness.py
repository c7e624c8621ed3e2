"""Task files of `examples/lm_eval`, and a whole run that asks tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from harness_kit import write_example_rows, write_tasks
from run_kit import carry_out
from typer.testing import CliRunner

from retain.cli import _commands, app
from retain.errors import DataError
from retain.probes.suite import load_probes
from retain.results import load_items

pytest.importorskip("lm_eval")
FOLDER = Path(__file__).parents[1] / "examples" / "lm_eval"


@pytest.fixture
def data(tmp_path, monkeypatch):
    write_example_rows(tmp_path)
    monkeypatch.setenv("LM_EVAL_DATA", str(tmp_path))


@pytest.mark.parametrize(
    ("file", "names", "metric", "chance"),
    [
        ("arc_easy", ["arc_easy_local"], "acc", 1 / 3),
        ("hellaswag", ["hellaswag_local"], "acc_norm", 1 / 3),
        ("piqa", ["piqa_local"], "acc", 1 / 3),
        ("blimp", [f"blimp_{n}_local" for n in ("morphology", "semantics", "syntax", "syntax_semantics")], "acc", 0.5),
    ],
)
def test_examples_read_local_rows(file, names, metric, chance, data):
    probes = load_probes(f"lm_eval:{FOLDER / file}.yaml", 4)
    assert [probe.name for probe in probes] == names
    assert all((probe.metric, len(probe.items), probe.chance) == (metric, 4, chance) for probe in probes)


def test_without_rows_one_line_says_where_they_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"set LM_EVAL_DATA to the folder that holds arc_easy/test\.jsonl") as caught:
        load_probes(f"lm_eval:{FOLDER / 'arc_easy.yaml'}")
    assert "\n" not in str(caught.value)


def test_examples_carry_no_path_of_a_machine():
    for path in sorted(FOLDER.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert "/home" not in text
        assert "data_files" not in text


def test_a_run_compares_its_items(shop, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    sources = [f"lm_eval:{folder}/tiny_group.yaml", f"lm_eval:{folder}/tiny_text.yaml"]
    changes = {"tasks": [str(shop / "count")], "methods": ["none"], "probes": {"reference": sources, "limit": 5}}
    results, _ = carry_out(shop, tmp_path / "run", **changes)
    found = {change.probe: change for change in results.changes}
    assert {"tiny_choice", "tiny_pair", "tiny_text"} <= found.keys()
    choice, text = found["tiny_choice"], found["tiny_text"]
    rows = {s: load_items(tmp_path / "run" / "probes" / f"{s}.parquet") for s in results.stages}
    before, after = ([r["correct"] for r in rows[s] if r["probe"] == "tiny_choice"] for s in results.stages)
    assert choice.lost == sum(b and not a for b, a in zip(before, after))
    assert choice.gained == sum(a and not b for b, a in zip(before, after))
    assert choice.forgetting_adjusted is not None
    assert text.before.value > 1
    assert text.difference.value != 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "tiny_text" in page
    assert "word_perplexity" in page


def test_the_command_line_asks_them(tiny_cache, tmp_path, data):
    _commands()
    source = f"lm_eval:{FOLDER / 'arc_easy.yaml'}"
    shown = CliRunner().invoke(app, ["probe", "starter", "-p", source, "--limit", "4"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    (line,) = [line for line in shown.output.splitlines() if "arc_easy_local" in line]
    assert [part.strip() for part in line.strip("│ ").split("│")][1:4] == ["capability", "acc", "4"]


def test_the_settings_of_a_group_name_its_files():
    group = yaml.safe_load((FOLDER / "blimp.yaml").read_text(encoding="utf-8"))
    assert all((FOLDER / f"{name.removesuffix('_local')}.yaml").is_file() for name in group["task"])
