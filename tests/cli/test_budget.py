"""`--budget` and `--keep`: what is understood, what `retain plan` says about it, and how a run ends."""

from __future__ import annotations

import sys

import pytest
import yaml
from run_kit import settings, write_config, write_lines
from typed import refused, typed

from retain.cli import run as command
from retain.cli.plan import configuration
from retain.config import parse
from retain.errors import ConfigError
from retain.functional.budget import items_needed
from retain.functional.certify import certifiable
from retain.results import Budget, Results
from retain.settings import share


@pytest.mark.parametrize("text", ["0.01", "1%", "1 %", "1pt", "1pts", "1 point", "1.0 points", "1e-2", ".01", 0.01])
def test_one_point_in_all_its_forms(text):
    assert share(text) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1", "1 points are 1%"),
        ("2.5", "2.5 points are 2.5%"),
        ("100%", "between 0 and 1"),
        ("0", "between 0 and 1"),
        ("little", "Give a share of the score such as 0.01, or points: 1%, 1pt"),
        ("-1%", "Give a share"),
        (True, "Give a share"),
    ],
)
def test_what_is_no_loss_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        share(text)


def test_the_options_become_the_section(tmp_path):
    made = configuration(None, ["data"], None, None, [], budget="1%", keep=["core", "lm_eval:arc_easy"])
    assert (made.budget.lose_at_most, made.budget.on) == (0.01, ["core", "lm_eval:arc_easy"])
    assert configuration(None, ["data"], None, None, []).budget is None
    assert configuration(None, ["data"], None, None, [], keep=["core"]).budget.lose_at_most == 0.02
    for given in ({"budget": "2 points"}, {"budget": 0.02}, {"budget": {"lose_at_most": "2%"}}):
        file = str(write_config(tmp_path / "a.yaml", {"tasks": ["data"], **given}))
        assert configuration(file, [], None, None, []).budget.lose_at_most == 0.02
        both = configuration(file, [], None, None, ["budget.every=5"], budget="0.5%")
        assert (both.budget.lose_at_most, both.budget.every) == (0.005, 5)
    for given in (True, None):
        file = str(write_config(tmp_path / "b.yaml", {"tasks": ["data"], "budget": given}))
        assert configuration(file, [], None, None, ["budget.every=5"]).budget.every == 5


def test_on_is_a_key_though_yaml_takes_it_for_true(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("tasks: [{data: x, on: all}]\nbudget: {on: [core]}\n")
    made = configuration(str(file), [], None, None, ["budget.every=5"])
    assert (made.budget.on, made.budget.every, made.tasks[0].on) == (["core"], 5, "all")
    assert parse(yaml.safe_load(file.read_text())).budget.on == ["core"]
    assert configuration(str(file), [], None, None, [], keep=["a", "b"]).budget.on == ["a", "b"]


def test_a_mistake_names_the_option_and_what_is_allowed(monkeypatch, capsys):
    line = refused(monkeypatch, capsys, "run", "--task", "data", "--budget", "1")
    assert line == (
        "retain: --budget 1: a loss lies between 0 and 1 of the score: 0.01 is one point, as are 1% and 1pt; "
        "1 points are 1%."
    )
    with pytest.raises(ConfigError, match=r"budget.lose_at_most: .*Give a share of the score.*given: 'some'"):
        parse({"tasks": ["data"], "budget": "some"})


@pytest.fixture(scope="module")
def sizes():
    return [200, 120]


@pytest.fixture
def wide(shop, tmp_path, sizes):
    """A probe file with many items of two probes, and texts."""
    rows = [
        {"probe": name, "prompt": f"{name} {i}?", "choices": [" bird", " ship"], "answer": i % 2}
        for name, size in zip(("birds", "ships"), sizes)
        for i in range(size)
    ]
    rows += [{"probe": "tales", "text": f"Seven small ships sailed {i} times over the sea."} for i in range(3)]
    return str(write_lines(tmp_path / "wide.jsonl", rows))


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path, shop, wide):
    def call(*words, code=0, **changes):
        values = settings(shop, tmp_path / "run", probes={"reference": [wide]}, **changes)
        file = write_config(tmp_path / "c.yaml", values)
        assert typed(monkeypatch, "plan", file, *words) == code
        return capsys.readouterr()

    return call


def test_plan_says_what_the_probes_can_be_sure_of(plan, sizes):
    shown, rest = plan("--budget", "2%").out.split("All settings:")
    none, some = (100 * certifiable(sizes, 0.95, flips) for flips in (0, 0.05))
    needed = items_needed(0.02, 0.95, 0.05, sizes)
    assert none < 2 < some
    for line in (
        "budget    at most 2 points lost, on 320 items of 2 probes; at most 0.05 nats per token, on 3 texts (95% conf",
        f"          if no answer changes: a loss above {none:.2g} points is ruled out; enough",
        f"a loss above {some:.2g} points is ruled out; {needed:,} items needed",
        "budget: looks while training",
        "budget: search afterwards, at most",
    ):
        assert line in shown
    assert yaml.safe_load(rest)["budget"]["lose_at_most"] == 0.02


def test_a_budget_that_so_few_items_cannot_certify_is_refused_with_their_number(plan, sizes):
    said = plan("--budget", "0.5%", code=2)
    assert str(items_needed(0.005, 0.95, strata=sizes)) in said.err


def test_what_is_kept_is_measured_though_no_probe_names_it(plan, shop):
    shown = plan("--budget", "60%", "--keep", str(shop / "probes.jsonl")).out
    assert "at most 60 points lost, on 4 items of 1 probes; at most 0.05 nats per token, on 2 texts" in shown


def test_without_a_budget_plan_says_nothing_of_it(plan):
    assert "budget  " not in plan().out.split("All settings:")[0]


@pytest.mark.parametrize("feasible", [True, False])
def test_a_run_whose_budget_was_not_met_ends_with_1_and_says_what_would_help(
    feasible, make_results, monkeypatch, capsys, tmp_path
):
    found = Budget(
        task="count",
        lose_at_most=0.01,
        lose_at_most_nats=0.05,
        confidence=0.95,
        probes=["animals"],
        items=40,
        feasible=feasible,
        share=float(feasible),
        points=[],
        advice=["more replay: a larger `fraction` or more rows"],
    )
    results: Results = make_results.model_copy(update={"budgets": [found]})
    monkeypatch.setattr("retain.pipeline.run", lambda settings, say: results)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(command, "configuration", lambda *given: parse({"tasks": ["data"], "output": str(tmp_path)}))
    assert typed(monkeypatch, "run", "--task", "data", "--budget", "1%") == (0 if feasible else 1)
    out = capsys.readouterr().out
    assert ("Budget met  count: all that was learned is kept." in out) == feasible
    last = out.strip().splitlines()[-1]
    if not feasible:
        assert last.startswith(
            "Budget not met (count): no part of what was learned could be shown to lose at most 1 po"
        )
        assert last.endswith("What would help: More replay: a larger fraction or more rows.")


@pytest.fixture
def make_results(tmp_path) -> Results:
    from fake_run import build_run

    (tmp_path / "fake").mkdir()
    return build_run(tmp_path / "fake", tasks=["count"], items=False, metrics=False)


def test_help_names_both(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("run", "plan"):
        monkeypatch.setattr(sys, "argv", ["retain", name, "--help"])
        assert typed(monkeypatch, name, "--help") == 0
        text = capsys.readouterr().out
        assert "--budget" in text
        assert "--keep" in text
