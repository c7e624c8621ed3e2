"""Terminal tables: the numbers are there at a narrow width, and text is never read as markup."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fake_run import HOSTILE
from rich.console import Console

from retain.errors import RunError
from retain.report import terminal, wording
from retain.results import load_results, save_results


def shown(renderable, width: int = 130) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_summary_names_every_probe_and_number(make_run):
    results = load_results(make_run(drop=0.2))
    text = shown(terminal.summary(results))
    for number in (wording.learned(results), wording.kept(results), wording.lost(results)):
        assert number.value in text
        assert number.interval in text
    for change in results.changes:
        assert change.probe in text
        assert f"{change.lost}/{change.gained}" in text
    assert wording.headline(results)[0] in text


def test_summary_without_training(make_run):
    text = shown(terminal.summary(load_results(make_run(tasks=()))))
    assert "nothing was trained" in text
    assert "countries" in text


def test_compare_puts_runs_in_columns(make_run):
    naive, careful = load_results(make_run("naive", drop=0.4)), load_results(make_run("careful", drop=0.02))
    text = shown(terminal.compare(naive, careful))
    for results in (naive, careful):
        assert results.name in text
        assert wording.lost(results).value in text
        assert wording.lost(results).interval in text


def test_compare_refuses_another_model(make_run):
    mine, place = load_results(make_run("mine")), make_run("other")
    other = load_results(place).model_copy(update={"model": "another/model"})
    save_results(other, place)
    with pytest.raises(RunError, match="same base model"):
        terminal.compare(mine, other)


def test_questions_side_by_side_and_no_markup():
    table = terminal.questions(
        ["[bold]Q[/bold]"], {"base": [HOSTILE], "naive": ["[link=x]y[/link]"], "retained": ["[/red]"]}
    )
    text = shown(table, 200)
    for words in ("[bold]Q[/bold]", "[link=x]y[/link]", "[/red]", "alert('x')"):
        assert words in text


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (-0.04, 1, True, "0.0"),
        (-3.25, 2, True, "−3.25"),
        (2, 0, True, "+2"),
        (None, 1, False, "–"),
        (float("nan"), 1, False, "–"),
    ],
)
def test_number(value, digits, sign, text):
    assert wording.number(value, digits, sign) == text


@pytest.mark.parametrize(("seconds", "text"), [(48.2, "48 s"), (720, "12 min"), (11_100, "3 h 05 min")])
def test_duration(seconds, text):
    assert wording.duration(seconds) == text


def test_tables_need_neither_torch_nor_matplotlib():
    code = (
        "import sys, retain.report.terminal; print(sorted({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
