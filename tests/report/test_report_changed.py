"""How the answers changed: every number of the last stage is shown, in the page and in the text."""

from __future__ import annotations

import json

import pytest
from browser import Page

from retain import drift
from retain.report import changed, write_report
from retain.report.markdown import cell
from retain.results import load_results, save_results

TITLE = "How the answers changed"


def written(directory) -> tuple[Page, str]:
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    return page, (directory / "report.md").read_text(encoding="utf-8")


def test_every_number_has_a_name():
    assert set(changed.SHIFTS) == set(drift.SHIFTS)


@pytest.mark.parametrize("tasks", [("one",), ("one", "two")])
def test_every_number_is_shown(make_run, tasks):
    directory = make_run(tasks=tasks, drop=0.25)
    results = load_results(directory)
    page, text = written(directory)
    agreed, moved = changed.agreed(results), changed.moved(results)
    assert len(agreed) == len(changed.AGREEMENT) + 1
    assert len(moved) == len(changed.SHIFTS)
    for row in [*agreed, *moved]:
        for part in row:
            assert str(part) in page.text, row
            assert cell(part) in text, row
    assert text.index("## The verdict in numbers") < text.index(f"## {TITLE}") < text.index("## How it was run")


def test_units(make_run):
    results = load_results(make_run(drop=0.25))
    rows = {row.name: row for row in changed.moved(results)}
    assert rows["Words per answer"][1:] == ("0.4", "0.3", "−0.1", "[−0.1, −0.1]", 100)
    lists = results.drift["01-reasoning"].shifts["lists"]
    assert rows["Answers with a list"].before == f"{100 * lists.before:.1f} %"
    assert rows["Answers with a list"].difference == f"−{-100 * lists.difference.value:.1f} points"
    kl = {row.name: row for row in changed.agreed(results)}["KL from the base, kl"]
    assert kl[1:3] == ("0.250", "[0.011, 0.789]")


def test_what_is_zero_on_both_sides_is_left_out(make_run):
    directory = make_run()
    results = load_results(directory)
    found = results.drift["01-reasoning"]
    none = found.shifts["bold"].model_copy(update={"before": 0.0, "after": 0.0})
    found = found.model_copy(update={"shifts": found.shifts | {"bold": none}})
    save_results(results.model_copy(update={"drift": {"01-reasoning": found}}), directory)
    page, _ = written(directory)
    assert "Answers with bold text" not in page.text
    assert "Answers with code" in page.text


def test_results_made_before_there_was_such_a_section(make_run):
    directory = make_run()
    path = directory / "results.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    del old["drift"]
    path.write_text(json.dumps(old), encoding="utf-8")
    assert load_results(directory).drift == {}
    page, text = written(directory)
    assert TITLE not in page.text
    assert TITLE not in text
