"""A limit on forgetting: three outcomes, exit codes, and the workflow that uses them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from retain import analysis, cli
from retain.errors import RetainError, RunError
from retain.report import gate
from retain.results import Estimate, ProbeInfo, load_results, save_results

WORKFLOW = Path(__file__).parents[2] / "examples/ci/forgetting-gate.yml"


@pytest.fixture
def retain():
    cli._commands()
    return lambda *words: CliRunner().invoke(cli.app, ["report", *map(str, words)])


def with_macro(directory: Path, low: float, high: float, one_sided: tuple[float, float] | None = None) -> Path:
    results = load_results(directory)
    value = (low + high) / 2
    sided = one_sided and Estimate(value=value, low=one_sided[0], high=one_sided[1])
    update = {"difference": Estimate(value=value, low=low, high=high), "one_sided": sided}
    save_results(results.model_copy(update={"verdict": results.verdict.model_copy(update=update)}), directory)
    return directory / "results.json"


@pytest.mark.parametrize(
    ("low", "high", "limit", "outcome"),
    [
        (-0.01, 0.02, 0.02, "kept"),  # the bound itself is within the limit
        (-0.01, 0.0201, 0.02, "not enough items to tell"),
        (0.02, 0.05, 0.02, "not enough items to tell"),
        (0.0201, 0.05, 0.02, "lost"),
        (0.001, 0.01, 0.0, "lost"),
        (-0.02, 0.0, 0.0, "kept"),
    ],
)
def test_three_outcomes(low, high, limit, outcome):
    assert gate.decide(low, high, limit) == outcome


@pytest.mark.parametrize(
    ("low", "high", "words", "plain", "strict"),
    [
        (-0.015, 0.02, "kept: ", 0, 0),
        (-0.06, -0.03, "lost: ", 1, 1),
        (-0.06, 0.01, "warning: not enough items to tell: ", 0, 1),
    ],
)
def test_exit_codes(make_run, retain, low, high, words, plain, strict):
    path = with_macro(make_run(items=False, metrics=False), low, high)
    for options, code in (([], plain), (["--strict"], strict)):
        done = retain(path, "--fail-over", "0.02", *options)
        assert done.exit_code == code
        assert done.stdout.startswith(words)
        assert len(done.stdout.splitlines()) == 1
        assert "limit of 2 points" in done.stdout
        assert f"{-100 * (low + high) / 2:.2f}".replace("-", "−") in done.stdout


def test_a_directory_has_its_report_written_too(make_run, retain):
    directory = make_run(drop=0.4)
    done = retain(directory, "--fail-over", "0.02", "--lang", "zh")
    assert done.exit_code == 1
    assert 'lang="zh-CN"' in (directory / "report.html").read_text(encoding="utf-8")
    assert done.stdout.splitlines()[1].startswith("已遗忘：")
    (directory / "run.yaml").write_text("language: zh\n", encoding="utf-8")
    (directory / "report.html").unlink()
    assert retain(directory).exit_code == 0
    assert 'lang="zh-CN"' in (directory / "report.html").read_text(encoding="utf-8")


def test_one_sided_bounds_decide(make_run):
    """The two-sided interval reaches over the limit, the one-sided bound does not."""
    directory = make_run(items=False, metrics=False)
    with_macro(directory, -0.025, 0.02)
    assert gate.check(load_results(directory), 0.02).outcome == "not enough items to tell"
    assert "two-sided: older results" in gate.check(load_results(directory), 0.02).line
    with_macro(directory, -0.025, 0.02, one_sided=(-0.019, 0.015))
    assert gate.check(load_results(directory), 0.02).outcome == "kept"
    assert "one-sided)" in gate.check(load_results(directory), 0.02).line


def test_the_bounds_are_those_of_a_normal_approximation():
    """Large probes: mean ∓ 1.645 standard errors of the macro mean."""
    random = np.random.default_rng(3)
    infos, tables, steps = [], ([], []), []
    for name, role, rate in (("a", "reference", 0.2), ("b", "reference", 0.1), ("c", "task", 0.3)):
        before = (random.random(3000) < 0.6).astype(float)
        after = np.where(random.random(3000) < rate, random.random(3000) < (0.9 if role == "task" else 0.2), before)
        task = "c" if role == "task" else None
        infos.append(
            ProbeInfo(name=name, kind="answer", group="g", role=role, task=task, metric="accuracy", items=3000)
        )
        for table, scores in zip(tables, (before, after)):
            table += [
                {"probe": name, "item": str(k), "score": float(s), "correct": bool(s), "tokens": 1, "details": "{}"}
                for k, s in enumerate(scores)
            ]
        steps.append(after - before)
    verdict = analysis.verdict(analysis.changes(*tables, infos), infos, *tables)
    error = np.sqrt(sum(step.var(ddof=1) / 3000 for step in steps[:2])) / 2
    mean = np.mean([step.mean() for step in steps[:2]])
    assert verdict.one_sided.value == verdict.difference.value == pytest.approx(mean)
    assert verdict.one_sided.low == pytest.approx(mean - 1.645 * error, abs=3e-4)
    assert verdict.one_sided.high == pytest.approx(mean + 1.645 * error, abs=3e-4)
    error = steps[2].std(ddof=1) / np.sqrt(3000)
    assert verdict.learned.value == pytest.approx(steps[2].mean())
    assert verdict.learned.low == pytest.approx(steps[2].mean() - 1.96 * error, abs=6e-4)


def test_what_cannot_be_held_to_a_limit(make_run):
    results = load_results(make_run(items=False, metrics=False))
    with pytest.raises(RunError, match=r"not finished .*still to learn: law.*retain run"):
        gate.check(results.model_copy(update={"ahead": ["law"]}), 0.02)
    with pytest.raises(RunError, match="no old ability that is scored from 0 to 1"):
        gate.check(load_results(make_run("measured", tasks=())), 0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strict"], "Give one with --fail-over"),
        ([], "a page needs the run directory"),
        (["--fail-over", "0.02", "--against", "x"], "a page needs the run directory"),
    ],
)
def test_mistakes(make_run, retain, options, words):
    path = make_run(items=False, metrics=False) / "results.json"
    done = retain(path, *options)
    assert isinstance(done.exception, RetainError)
    assert words in str(done.exception)


def test_a_limit_is_typed_as_a_budget_is(make_run, retain):
    path = with_macro(make_run(items=False, metrics=False), -0.015, 0.02)
    said = {retain(path, "--fail-over", word).output for word in ("0.02", "2%", "2pt")}
    assert len(said) == 1
    assert said.pop().startswith("kept: ")
    assert retain(with_macro(path.parent, -0.01, -0.001), "--fail-over", "0").exit_code == 1
    refused = retain(path, "--fail-over", "2")
    assert refused.exit_code == 2
    assert "2 points are 2%" in " ".join(refused.output.replace("│", " ").split())


def test_names_what_dropped(make_run):
    directory = make_run(items=False, metrics=False)
    results = load_results(directory)
    verdict = results.verdict.model_copy(update={"lost_over_threshold": ["grammar"]})
    line = gate.check(results.model_copy(update={"verdict": verdict}), 0.02).line
    assert re.search(r"; dropped by more than 30 %( \(may be chance\))?: grammar$", line)


def test_the_workflow_calls_what_there_is(make_run, retain, monkeypatch):
    """Its `retain` commands are parsed by the command line itself; `retain report` runs on a finished run."""
    found = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert set(found["jobs"]) == {"committed", "trained"}
    assert True in found or "on" in found  # YAML 1.1 reads the key `on` as true
    steps = [step for job in found["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    lines = [line.strip() for step in steps for line in step.get("run", "").splitlines()]
    commands = [shlex.split(line.split(" | ")[0].split(" || ")[0]) for line in lines if line.startswith("retain ")]
    assert [words[1] for words in commands] == ["report", "run", "report"]
    import typer.main

    app = typer.main.get_command(cli.app)
    directory = make_run(drop=0.0, items=False, metrics=False)
    values = {"$LIMIT": found["env"]["LIMIT"], "$results": str(directory / "results.json"), "runs/finetune": directory}
    values |= {"runs/finetune/card.md": directory / "card.md"}
    for words in commands:
        words = [str(values.get(word, word)) for word in words[1:]]
        app.commands[words[0]].make_context(words[0], words[1:])  # raises for an option that is not there
        if words[0] == "report":
            done = retain(*words[1:])
            assert done.exit_code in (0, 1), done.output
            assert re.search(r"^(warning: )?(kept|lost|not enough)", done.stdout, re.MULTILINE)
    assert (directory / "card.md").is_file()
    files = next(step["with"]["path"].split() for step in steps if "path" in step.get("with", {}))
    assert all((directory / Path(name).name).is_file() for name in files)


def test_the_limit_is_in_the_unit_of_the_score(make_run):
    results = load_results(make_run(items=False, metrics=False))
    assert json.loads(results.model_dump_json())["verdict"]["difference"]["value"] == pytest.approx(
        -gate.bounds(results).value
    )
