"""Other numbers of a probe, in the page and the Markdown, in both languages."""

from __future__ import annotations

import re

import pytest
from browser import Page

from retain.report import totals, wording, write_report
from retain.report.language import speaking
from retain.results import ClassNumbers, ProbeInfo, Totals, load_results, save_results


def of_class(f1: float) -> ClassNumbers:
    return ClassNumbers(precision=f1 + 0.1, recall=f1 - 0.1, f1=f1, items=7)


@pytest.fixture
def run(make_run):
    """A run whose old answers have more numbers, and a probe with classes, which lose a tenth at every stage."""
    directory = make_run(tasks=("one", "two"))
    results = load_results(directory)
    found = {
        stage: {
            "arithmetic": Totals(numbers={"micro_f1": 0.8 - 0.1 * k, "corpus_bleu": 0.6 - 0.1 * k}),
            "countries": Totals(
                numbers={"accuracy": 0.5, "macro_f1": 0.7 - 0.1 * k},
                classes={"<b>": of_class(0.6 - 0.1 * k), "other": of_class(0.5)},
            ),
        }
        for k, stage in enumerate(results.stages)
    }
    save_results(results.model_copy(update={"totals": found}), directory)
    return directory


def test_before_and_after_are_the_first_and_the_last_stage(run):
    results = load_results(run)
    assert totals.heads(results) == ["Before", "After"]
    assert totals.numbers(results) == [
        ("countries", "F1, macro", ["70.0 %", "50.0 %"]),
        ("arithmetic", "F1, micro", ["80.0 %", "60.0 %"]),
        ("arithmetic", "BLEU, corpus", ["60.0 %", "40.0 %"]),
    ]
    first, second = totals.classes(results)
    assert first == ("countries", "<b>", 7, ["70.0 % → 50.0 %", "50.0 % → 30.0 %", "60.0 % → 40.0 %"])
    assert second.cells[2] == "50.0 % → 50.0 %"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_both_reports_show_them(run, lang):
    text = write_report(run, lang=lang).read_text(encoding="utf-8")
    page, lines = Page(text), (run / "report.md").read_text(encoding="utf-8")
    assert page.open == []
    with speaking(lang):
        found = totals.shown(load_results(run))
    for probe, number, cells in found.numbers:
        assert " ".join([probe, number, *cells]) in page.text
        assert " | ".join([probe, number, *cells]) in lines
    for one in found.classes:
        assert " ".join([one.probe, one.name, str(one[2]), *one.cells]) in page.text
    assert "&lt;b&gt; | 7 |" in lines
    assert re.search("语料级" if lang == "zh" else "corpus", lines)


def test_runs_beside_it_have_a_column(run, make_run):
    other = make_run("other", tasks=("one", "two"), seed=1)
    theirs = load_results(other)
    last = {theirs.stages[-1]: {"countries": Totals(numbers={"macro_f1": 0.125})}}
    beside = [("other", theirs.model_copy(update={"totals": last}))]
    assert totals.heads(load_results(run), beside) == ["Before", "After", "After, other"]
    assert totals.numbers(load_results(run), beside)[0][2] == ["70.0 %", "50.0 %", "12.5 %"]
    assert totals.numbers(load_results(run), beside)[1][2] == ["80.0 %", "60.0 %", "–"]


def test_a_model_that_was_only_measured_has_one_column(make_run):
    results = load_results(make_run(tasks=()))
    assert totals.shown(results).numbers == []
    found = {results.stages[0]: {"arithmetic": Totals(numbers={"rouge_l": 0.5})}}
    found = results.model_copy(update={"totals": found})
    assert totals.heads(found) == ["Score"]
    assert totals.numbers(found) == [("arithmetic", "ROUGE-L", ["50.0 %"])]


@pytest.mark.parametrize(
    ("metric", "unit"),
    [("perplexity", "nats"), ("word_perplexity", "nats per word"), ("byte_perplexity", "nats per byte")],
)
def test_units_of_perplexities(metric, unit):
    kind = "harness" if "_" in metric else "perplexity"
    info = ProbeInfo(name="text", kind=kind, group="knowledge", role="reference", metric=metric, items=9)
    assert wording.unit(info) == unit
    assert wording.score(info, 12.345) == "12.35"
