"""What is kept is a share of what was there: between 0 and 100 %, and gains elsewhere do not make more of it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from retain.functional.forgetting import perplexity_retention
from retain.report import terminal, wording, write_report
from retain.results import load_results, save_results

TASK, TEXT = "reasoning test", "plain text"


def shifted(results, by, low=None, high=None):
    """The results with every reference share `by` higher after than before, macro interval included."""
    changes = [
        c
        if c.probe in (TASK, TEXT)
        else c.model_copy(
            update={
                "after": c.after.model_copy(update={"value": c.before.value + by}),
                "difference": c.difference.model_copy(update={"value": by}),
            }
        )
        for c in results.changes
    ]
    macro = results.verdict.difference.model_copy(
        update={"value": by, "low": by - 0.02 if low is None else low, "high": by + 0.02 if high is None else high}
    )
    verdict = results.verdict.model_copy(update={"difference": macro})
    return results.model_copy(update={"changes": changes, "verdict": verdict})


def mean_before(results):
    values = [c.before.value for c in results.changes if c.probe not in (TASK, TEXT)]
    return sum(values) / len(values)


def ends(number):
    low, high = re.fullmatch(r"95 %: \[([\d.]+), ([\d.]+)\]", number.interval).groups()
    return float(low), float(high)


@pytest.mark.parametrize("by", [0.0, 0.02, 0.3])
def test_a_gain_is_not_more_than_all_of_it(make_run, by):
    results = shifted(load_results(make_run()), by)
    number = wording.kept(results)
    assert number.value == "100.0 %"
    low, high = ends(number)
    assert low == pytest.approx(min(100, 100 * (1 + (by - 0.02) / mean_before(results))), abs=0.051)
    assert high == 100
    assert wording.lost(results).value == "nothing"


def test_a_loss_is_as_large_as_it_is(make_run):
    """Only what is above is cut: value and lower end below 100 stay, the upper end reaches 100 at most."""
    results = shifted(load_results(make_run()), -0.01)
    before = mean_before(results)
    assert wording.kept(results).value == f"{100 * (1 - 0.01 / before):.1f} %"
    assert ends(wording.kept(results)) == (pytest.approx(100 * (1 - 0.03 / before), abs=0.051), 100)
    wide = shifted(results, -0.1, low=-2.0, high=-0.05)
    assert ends(wording.kept(wide)) == (0, pytest.approx(100 * (1 - 0.05 / before), abs=0.051))


@pytest.mark.parametrize(("before", "after"), [(14.2, 15.0), (14.2, 9.0), (14.2, 40.0)])
def test_perplexities_alone(make_run, before, after):
    """2 − after/before, from 0 to 100 %."""
    results = load_results(make_run())
    probes = [info for info in results.probes if info.name == TEXT]
    change = next(c for c in results.changes if c.probe == TEXT)
    for stored in (perplexity_retention(before, after), 100 * (2 - after / before)):  # as of now, and not capped
        found = results.model_copy(
            update={"probes": probes, "changes": [change.model_copy(update={"retention": stored})]}
        )
        expected = 100 * min(1, max(0, 2 - after / before))
        assert wording.kept(found).value == f"{expected:.1f} %"


def test_no_report_says_more_than_everything(make_run):
    directory = make_run()
    save_results(shifted(load_results(directory), 0.3), directory)
    kept = wording.kept(load_results(directory))
    uncapped = f"{100 * (1 + 0.3 / mean_before(load_results(directory))):.1f} %"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal.summary(load_results(directory)))
    page = write_report(directory).read_text(encoding="utf-8")
    for text in (page, (directory / "report.md").read_text(encoding="utf-8"), console.export_text()):
        assert "100.0 %" in text
        assert kept.interval in text
        assert uncapped not in text
