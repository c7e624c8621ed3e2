"""The bench of budgets: what it compares, and the page that it writes; nothing is trained here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import auto_strength  # noqa: E402
import budget  # noqa: E402
import budget_runs  # noqa: E402
from matched import Point  # noqa: E402

from retain.config import parse  # noqa: E402


def digits(right: int, of: int = 40) -> str:
    return "1" * right + "0" * (of - right)


def a_run(name: str, seed: int, lost: int, learned: int, share: float = 1.0) -> dict:
    """Of 40 items of each kept probe 30 are right before; `lost` of them are not after."""
    before = {f"{p}_{half}": digits(30) for p in ("capitals", "sums") for half in budget_runs.HALVES}
    after = {key: digits(30 - lost) for key in before} | {budget_runs.TASK: digits(learned)}
    record = {
        "feasible": share > 0, "share": share, "factor": 2.0, "drift": 0.1, "drift_limit": 0.2, "learned_without": 0.5,
        "points": [{"share": share, "loss": {"value": lost / 40}, "upper": lost / 40 + 0.02}],
    }  # fmt: skip
    return {
        "name": name, "seed": seed, "seconds": 1.0, "train_seconds": 1.0,
        "before": before | {budget_runs.TASK: digits(0)}, "after": after,
        "budget": record if name.startswith("budget") else None,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "BUDGETS", (0.03, 0.1))
    for seed in range(3):
        runs = [a_run("budget-0.1", seed, 3, 20), a_run("budget-0.03", seed, 2 if seed else 1, 12)]
        runs += [a_run("fixed-0", seed, 12, 24), a_run("fixed-1", seed, 3, 14 + seed), a_run("fixed-4", seed, 0, 4)]
        for run in runs:
            (tmp_path / f"{run['name']}-seed{seed}.json").write_text(json.dumps(run))
    return tmp_path


def test_held_losses_are_means_over_probes():
    run = a_run("budget-0.1", 0, 4, 0)
    run["before"]["sums_held"], run["after"]["sums_held"] = digits(20, 20), digits(15, 20)
    assert budget.lost(run, "held").mean() == pytest.approx((4 / 40 + 5 / 20) / 2)
    assert budget.lost(run, "control").mean() == pytest.approx(4 / 40)


def test_the_front_of_fixed_settings_is_read_at_the_loss_of_the_budget(results):
    fixed = [budget.load(results, name, range(3)) for name in ("fixed-0", "fixed-1", "fixed-4")]
    at, difference = budget.same_loss(budget.load(results, "budget-0.1", range(3)), fixed)
    assert at == pytest.approx((14 + 15 + 16) / 3 / 40), "lost as much as fixed-1"
    assert difference.value == pytest.approx(20 / 40 - at)


def test_the_page_counts_what_is_above_the_budget(results):
    text = budget.page(results, range(3))
    assert "**Held loss above the budget in 2 of 6** runs" in text, "2 of 40 is above 3 points, 3 of 40 not above 10"
    rows = {
        line.split("|")[1].strip() if "|" in line else "": line for line in text.partition("## Fixed")[0].splitlines()
    }
    assert "| 2 of 3 |" in text
    assert "×1: 37.5" in rows["10"], "the best fixed setting whose mean loss is inside 10 points"
    assert "×4: 10.0" in text, "and inside 3 points"


def test_the_page_in_the_docs_is_what_the_results_say():
    page = (budget.ROOT / "docs" / "budget_study.md").read_text(encoding="utf-8")
    assert page == budget.page(budget.RESULTS, range(5))


def test_every_run_of_the_study_is_a_configuration(tmp_path):
    data = tmp_path / "data"
    rows = [{"prompt": f"The capital of land{i} is", "response": f"town{i}", "relation": "capital"} for i in range(9)]
    rows += [
        {"prompt": f"land{i} is a country in the continent of", "response": "Asia", "relation": "continent"}
        for i in range(9)
    ]
    tasks = [{"task": family, "prompt": "1, 2, ?", "response": "3"} for family in budget_runs.FAMILIES]
    for name, content in (
        ("facts_countries/test", rows),
        ("reasoning_gym/train", tasks),
        ("reasoning_gym/test", tasks),
    ):
        path = data / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    study = budget_runs.Study(data, tmp_path / "work", tmp_path / "results")
    names = [name for name, seed in study.jobs([0, 1]) if seed == 1]
    assert len(names) == len(budget_runs.BUDGETS) + len(budget_runs.FACTORS)
    for name in names:
        config = study.config(name, 1)
        assert (config.budget is not None) == name.startswith("budget-")
        assert parse(config.model_dump(mode="json")) == config
    halves = budget_runs.halves(data)
    assert not {r["prompt"] for r in halves["control"]} & {r["prompt"] for r in halves["held"]}
    assert [study.claim("fixed-0", 1), study.claim("fixed-0", 1)] == [True, False], "one process alone carries it out"


def point(new: float, lost: float, seed: int = 0) -> Point:
    draw = np.random.default_rng(seed)
    return Point("", *((draw.random((4, 96)) < share).astype(float) for share in (new, lost)))


@pytest.mark.parametrize(("auto", "word"), [((0.9, 0.2), "better"), ((0.3, 0.8), "**worse**"), ((0.6, 0.5), "as good")])
def test_auto_is_judged_at_equal_loss_and_at_equal_learning(auto, word):
    grid = [point(0.3, 0.2, 1), point(0.6, 0.5, 2), point(0.9, 0.8, 3)]
    assert auto_strength.compared(point(*auto, seed=4), grid)[2] == word


def test_the_grid_is_around_the_strength_of_the_example():
    grid, auto = auto_strength.settings("ewc")
    strengths = [next(e for e in setting["recipe"] if "ewc" in e)["ewc"]["strength"] for setting in grid]
    assert np.allclose(np.diff(np.log10(strengths)), 1)
    assert {next(e for e in setting["recipe"] if "ewc" in e)["ewc"]["strength"] for setting in auto} == {"auto"}


def test_the_grid_stays_below_one_where_a_strength_must():
    grid, _ = auto_strength.settings("label_smoothing")
    strengths = [next(e for e in setting["recipe"] if "label_smoothing" in e) for setting in grid]
    assert [s["label_smoothing"]["strength"] for s in strengths] == [0.001, 0.01, 0.1, 0.3, 0.9]


def test_the_page_counts_verdicts():
    grid = [point(0.3, 0.2, 1), point(0.6, 0.5, 2), point(0.9, 0.8, 3)]
    autos = [point(*auto, seed=4) for auto in ((0.9, 0.2), (0.3, 0.8), (0.6, 0.5))]
    text = auto_strength.page({"ewc": (grid, autos)}, [0, 1])
    assert "**Worse in 1 of 3**, better in 1." in text
    assert text.count("| `ewc` |") == 6
