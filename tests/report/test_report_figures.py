"""Charts: well-formed, reproducible, and their curves against a slow count by hand."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from retain.report import figures
from retain.report.canvas import INK, short
from retain.report.curves import kept_curves, thin, timeline
from retain.results import load_metrics, load_results


def test_all_pictures_are_xml_and_say_what_they_show(make_run):
    directory = make_run(tasks=("one", "two"))
    pictures = figures.draw(load_results(directory), load_metrics(directory))
    assert [picture.name for picture in pictures] == ["matrix", "scores", "forgetting", "training"]
    for picture in pictures:
        ElementTree.fromstring(picture.svg)
        inside = ElementTree.fromstring(picture.inline)
        assert inside.tag == "svg"
        assert "width" not in inside.attrib
        assert INK not in picture.inline
        assert "date" not in picture.svg.lower()
        assert len(picture.alt) > 20


def test_inline_ids_are_unique_and_resolve(make_run):
    directory = make_run(tasks=("one", "two"))
    page = "".join(p.inline for p in figures.draw(load_results(directory), load_metrics(directory)))
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used
    assert used <= set(names)


def test_matrix_shows_every_cell(make_run):
    results = load_results(make_run(tasks=("one", "two", "three")))
    svg = figures.matrix(results).svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    cells = [f"{100 * value:.0f}" for row in results.matrix for value in row]
    assert sorted(text for text in texts if re.fullmatch(r"\d+|–", text)) == sorted(cells)


def test_matrix_with_gaps_and_other_units(make_run):
    results = load_results(make_run(tasks=("one", "two")))
    gaps = results.model_copy(update={"matrix": [[None, None], [12.5, None], [11.0, 14.25]]})
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figures.matrix(gaps).svg)
    assert texts.count("–") == 3
    assert {"12.5", "11", "14.2"} <= set(texts)


@pytest.mark.parametrize(
    ("colour", "expected"), [((1, 1, 1), 1.0), ((0, 0, 0), 0.0), ((1, 0, 0), 0.2126), ((0.5, 0.5, 0.5), 0.2140)]
)
def test_luminance(colour, expected):
    assert figures.luminance(colour) == pytest.approx(expected, abs=1e-4)


def test_timeline_counts_over_tasks_and_repeated_steps():
    metrics = [
        {"kind": "step", "task": "a", "step": 1, "loss": 3.0},
        {"kind": "step", "task": "a", "step": 2, "loss": 2.0},
        {"kind": "step", "task": "a", "step": 2, "loss": 2.5},
        {"kind": "look", "stage": "01-a", "probe": "p", "score": 0.5},
        {"kind": "step", "task": "b", "step": 1, "loss": 4.0},
        {"kind": "look", "stage": "02-b", "probe": "p", "score": 0.4},
        {"kind": "other"},
    ]
    steps, looks = timeline(metrics)
    assert [(record["at"], record["loss"]) for record in steps] == [(1, 3.0), (2, 2.5), (3, 4.0)]
    assert [record["at"] for record in looks] == [2, 3]


def test_thin_keeps_the_mean_and_short_series():
    x, y = thin(range(900), [float(k % 7) for k in range(900)], most=300)
    assert len(x) == len(y) == 300
    assert y.mean() == pytest.approx(sum(k % 7 for k in range(900)) / 900)
    assert list(thin([1, 2], [3.0, 4.0])[1]) == [3.0, 4.0]


def test_kept_curves_end_at_the_retention(make_run):
    results = load_results(make_run(tasks=("one", "two"), drop=0.2))
    curves, unit = kept_curves(results, [])
    assert unit == "stage"
    retention = {change.probe: change.retention for change in results.changes}
    for probe, curve in curves.items():
        assert curve[0] == pytest.approx(100)
        assert min(100.0, curve[2]) == pytest.approx(retention[probe])
    assert "one test" not in curves


def test_kept_curves_turn_a_share_where_lower_is_better(make_run):
    results = load_results(make_run(drop=0.3))
    probes = [p.model_copy(update={"higher_is_better": False}) if p.name == "grammar" else p for p in results.probes]
    curve = kept_curves(results.model_copy(update={"probes": probes}), [])[0]["grammar"]
    before, after = (results.scores[stage]["grammar"].value for stage in results.stages)
    assert curve[1] == pytest.approx(100 * (1 - after) / (1 - before))


def test_a_single_loss_and_odd_values_draw(make_run):
    metrics = [
        {"kind": "step", "task": "a", "step": 1, "loss": 3.0},
        {"kind": "step", "task": "a", "step": 2, "loss": None},
    ]
    assert figures.training(metrics) is not None
    assert figures.training([{"kind": "step", "task": "a", "step": 1, "loss": float("nan")}]) is None
    assert figures.training([]) is None


def test_short():
    assert short("a  b\nc") == "a b c"
    assert short("x" * 40, 10) == "x" * 9 + "…"
