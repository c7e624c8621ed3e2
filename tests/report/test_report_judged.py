"""The verdict in numbers: all of them are shown, with what they mean, below the verdict and the pictures."""

from __future__ import annotations

import pytest
from browser import Page

from retain.report import judged, write_report
from retain.report.markdown import cell
from retain.results import Thresholds, load_results, save_results


def written(directory) -> tuple[Page, str]:
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    return page, (directory / "report.md").read_text(encoding="utf-8")


def test_every_number_of_the_verdict_is_shown_and_explained(make_run):
    directory = make_run(drop=0.2)
    results = load_results(directory)
    page, text = written(directory)
    rows = {row.name: row for row in judged.rows(results)}
    assert list(rows) == [
        *("Improvement", "Relative drop", "Items lost", "Items lost, chance-adjusted", "Items lost, know or guess"),
        *("Balance", "Stability-efficiency", "Successful"),
    ]
    for row in rows.values():
        for part in row:
            assert part in page.text, row
            assert cell(part) in text, row
        assert bool(row.interval) == (row.name != "Successful")
    found = results.verdict.intervals["forgetting_paired"]
    row = rows["Items lost, know or guess"]
    assert row.value.replace("−", "-") == f"{100 * found.value:.1f} %"
    assert row.interval.replace("−", "-") == f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"
    assert rows["Balance"].value == "0.700"
    for name, cells in judged.probes(results):
        assert name in page.text
        for words in cells:
            assert words in page.text
            assert words in text
    assert dict(judged.probes(results))["arithmetic"][1:] == ["–", "–"]  # nothing to guess
    assert "plain text" not in dict(judged.probes(results))


@pytest.mark.parametrize("tasks", [("one",), ("one", "two")])
def test_the_numbers_stand_below_the_verdict_and_the_heat_map(make_run, tasks):
    page, text = written(make_run(tasks=tasks))
    numbers = page.text.index("The verdict in numbers")
    assert page.text.index("Learned") < page.text.index("Score on every task after every stage") < numbers
    assert text.index("| Learned |") < text.index("## Tasks") < text.index("## The verdict in numbers")


def test_the_thresholds_that_were_used_are_said(make_run):
    directory = make_run()
    results = load_results(directory)
    used = {"keep_weight": 0.75, "learn_weight": 0.25, "max_forgetting": 0.07, "min_improvement": 0.33}
    used |= {"min_reference": 0.41, "alarm": 0.11, "margin": 0.013, "margin_nats": 0.017}
    save_results(results.model_copy(update={"thresholds": Thresholds(**used)}), directory)
    page, text = written(directory)
    for shown in (page.text, text):
        for words in ("0.75 · (1", "0.25 · (0.5", "below 7 %", "above 33 %", "above 0.41", "more than 11 %"):
            assert words in shown
        assert "at most 1.3 points (0.017 nats per token" in shown


def test_groups_stage_by_stage(make_run):
    directory = make_run(tasks=("one", "two"), drop=0.1)
    results = load_results(directory)
    page, text = written(directory)
    assert [stage for stage, _ in judged.groups(results)] == ["after one", "after two"]
    for group, deltas in results.group_deltas.items():
        assert group in page.text
        for delta in deltas:
            assert f"{100 * delta.value:+.1f} [".replace("-", "−") in page.text
            assert f"{100 * delta.value:+.1f} [".replace("-", "−") in text
    assert "Intransigence" not in page.text  # no single-task score: no dash either


def test_an_unfinished_run_says_so(make_run):
    directory = make_run(tasks=("one", "two"))
    save_results(load_results(directory).model_copy(update={"ahead": ["three", "four"]}), directory)
    page, text = written(directory)
    for shown in (page.text, text):
        assert "So far, 2 of 4 tasks; still to learn: three, four." in shown


@pytest.mark.parametrize("tasks", [(), ("one",)])
def test_results_without_these_numbers_are_shown_without_them(make_run, tasks):
    """Results that were written before there were intervals, or where nothing was trained."""
    directory = make_run(tasks=tasks)
    results = load_results(directory)
    bare = results.verdict and results.verdict.model_copy(update={"intervals": {}})
    changes = [c.model_copy(update={"intervals": {}, "forgetting_raw": None}) for c in results.changes]
    save_results(results.model_copy(update={"verdict": bare, "changes": changes, "group_deltas": {}}), directory)
    page, _ = written(directory)
    assert page.open == []
    assert ("The verdict in numbers" in page.text) == bool(tasks)
    assert "Items lost, probe by probe" not in page.text
