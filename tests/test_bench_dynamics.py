"""Forecasts of real trainings: looks are made and kept, and the page shows what the bench makes of those kept."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import dynamics as bench  # noqa: E402
import small_world  # noqa: E402

from retain.functional import dynamics  # noqa: E402
from retain.report.dynamics import read_looks  # noqa: E402
from retain.results import append  # noqa: E402


def test_the_page_shows_what_was_measured(capsys, tmp_path):
    page = tmp_path / "dynamics.md"
    page.write_text("before\n<!-- bench/dynamics.py -->\nold\n<!-- end -->\nafter\n")
    bench.main(["--write", str(page)])
    table = capsys.readouterr().out.strip()
    assert table.count("\n") == 1 + len(bench.RUNS) * len(dynamics.LAWS), "nothing was trained for this"
    assert page.read_text() == f"before\n<!-- bench/dynamics.py -->\n{table}\n<!-- end -->\nafter\n"
    assert table in (ROOT / "docs" / "dynamics.md").read_text(encoding="utf-8")


def test_a_run_that_follows_the_law_is_forecast(tmp_path):
    rng = np.random.default_rng(0)
    for step in range(0, 101, 5):
        lost = -0.4 * np.expm1(-step / 50) + (0.003 * rng.normal() if step else 0)
        append(tmp_path / "run" / "metrics.jsonl", {"kind": "monitor", "step": step, "loss_rise": lost})
    found = bench.check("run", tmp_path / "run", "saturating")
    assert (found.fitted, found.looks) == (10, 10)
    assert found.covered >= 8
    assert found.error < 0.02
    assert bench.check("run", tmp_path / "run", "power").error > found.error


@pytest.mark.parametrize("rank", [0, 2])
def test_a_training_leaves_its_looks(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(small_world, "pretrained", lambda seed, folder: small_world.untrained(seed))
    bench.train(bench.Training("world", rank, 1e-3, 6, 2), tmp_path)
    looks = read_looks(tmp_path)
    assert looks.steps == [0, 2, 4, 6]
    assert looks.forgetting[0] == 0
    assert len(set(looks.forgetting)) == 4
