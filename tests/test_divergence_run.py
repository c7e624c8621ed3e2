"""Divergence from the base in whole runs: what is kept, what the results say, and what is never written."""

from __future__ import annotations

import pytest
from run_kit import carry_out, settings, write_lines

from retain.cli import probe
from retain.config import parse
from retain.errors import DataError
from retain.probes.divergence import Divergence
from retain.results import load_items, load_results
from retain.rundir import BASE, RunDirectory, share_baseline

ROWS = [
    {"probe": "kl", "kind": "divergence", "text": "Seven small ships sailed over the sea."},
    {"probe": "kl", "kind": "divergence", "prompt": "Which animal can fly?", "max_tokens": 4},
]
SAID = [{"probe": "says", "prompt": f"Name animal {i}.", "answers": ["bird"], "max_tokens": 4} for i in range(3)]


@pytest.fixture(scope="module")
def changes(shop):
    path = write_lines(shop / "kl.jsonl", ROWS + SAID)
    choices = [{"probe": "c", "prompt": f"Is {i} a?", "choices": [" bird", " ship"], "answer": i % 2} for i in range(4)]
    write_lines(shop / "kl.jsonl", ROWS + SAID + choices)
    return {"tasks": [str(shop / "count")], "methods": ["none"], "old": None, "probes": {"reference": [str(path)]}}


@pytest.fixture(scope="module")
def finished(shop, changes, tmp_path_factory):
    place = tmp_path_factory.mktemp("kl") / "run"
    return place, carry_out(shop, place, **changes)[0]


def by_stage(place, stage):
    return [row for row in load_items(place / "probes" / f"{stage}.parquet") if row["probe"] == "kl"]


def test_the_base_is_at_zero_and_the_trained_model_is_not(finished):
    place, results = finished
    base, later = results.stages
    assert results.scores[base]["kl"].model_dump() == {"value": 0, "low": 0, "high": 0}
    rows = by_stage(place, later)
    found = results.scores[later]["kl"]
    assert found.value == pytest.approx(sum(r["score"] for r in rows) / sum(r["tokens"] for r in rows))
    assert found.value > 0.001
    assert results.drift[later].divergence["kl"] == found
    assert results.drift[later].agreement["tokens"].value <= 1


def test_a_divergence_is_no_ability_that_could_be_lost(finished):
    _, results = finished
    assert [info.name for info in results.probes] == ["kl", "says", "c", "count"]
    assert [change.probe for change in results.changes] == ["says", "c", "count"]
    assert "kl" not in results.verdict.lost_over_threshold


def test_the_results_and_the_report_say_how_the_answers_changed(finished):
    place, results = finished
    found = load_results(place).drift[results.stages[-1]]
    assert set(found.agreement) == {"choices", "answers", "beginning", "tokens"}
    assert {"words", "ece", "brier"} <= set(found.shifts)
    assert found.shifts["words"].items == 3  # of the old questions, not of the task's
    for name in ("report.html", "report.md"):
        text = (place / name).read_text(encoding="utf-8")
        assert "How the answers changed" in text
        assert "KL from the base, kl" in text


def test_a_run_that_goes_on_asks_the_base_no_more(shop, changes, finished, monkeypatch):
    place, results = finished
    (place / "probes" / f"{results.stages[1]}.parquet").unlink()
    monkeypatch.setattr(Divergence, "_ask", lambda *given: pytest.fail("the base was asked again"))
    again, _ = carry_out(shop, place, **changes)
    assert again.scores == results.scores


def test_what_is_lost_is_asked_of_the_base_anew(shop, changes, finished):
    place, results = finished
    (kept,) = RunDirectory(place).base_outputs.iterdir()
    said = kept.read_bytes()
    kept.unlink()
    (place / "probes" / f"{results.stages[1]}.parquet").unlink()
    again, _ = carry_out(shop, place, **changes)
    assert again.scores == results.scores
    assert kept.read_bytes() == said


def test_another_run_takes_over_what_the_base_said(shop, changes, finished, tmp_path):
    place, _ = finished
    config = parse(settings(shop, tmp_path / "other", **changes))
    share_baseline(RunDirectory(place), config)
    ours, theirs = (RunDirectory(folder).base_outputs for folder in (place, tmp_path / "other"))
    assert [f.read_bytes() for f in ours.iterdir()] == [f.read_bytes() for f in theirs.iterdir()]
    assert by_stage(tmp_path / "other", BASE) == by_stage(place, BASE)


def test_a_private_run_keeps_no_token_and_measures_the_same(shop, changes, finished, tmp_path):
    results, _ = carry_out(shop, tmp_path / "private", **changes, private=True)
    assert not RunDirectory(tmp_path / "private").base_outputs.exists()
    assert results.scores == finished[1].scores
    (row, _) = by_stage(tmp_path / "private", results.stages[1])
    assert (row["prompt"], row["reference"]) == ("", "")
    found = results.drift[results.stages[1]]
    assert set(found.agreement) == {"choices", "tokens"}
    assert "words" not in found.shifts


def test_probe_of_a_run_compares_with_its_base(finished, tmp_path):
    place, results = finished
    path = write_lines(tmp_path / "kl.jsonl", ROWS)
    kept = sorted(f.name for f in (place / "probes").rglob("*"))
    items = tmp_path / "items.parquet"
    probe.command(str(place), [str(path)], None, str(items))
    rows, expected = load_items(items), by_stage(place, results.stages[1])
    assert [r["tokens"] for r in rows] == [r["tokens"] for r in expected]
    assert [r["score"] for r in rows] == pytest.approx([r["score"] for r in expected], rel=1e-3)
    other = write_lines(tmp_path / "other.jsonl", [row | {"probe": "new"} for row in ROWS])
    probe.command(str(place), [str(other)], None, str(items))  # of which the run knows nothing: its base is loaded
    assert [r["score"] for r in load_items(items)] == pytest.approx([r["score"] for r in rows], rel=1e-3)
    assert sorted(f.name for f in (place / "probes").rglob("*")) == kept  # the run is read, not written


def test_probe_of_a_model_without_a_base_is_bad_input(shop, tmp_path):
    path = write_lines(tmp_path / "kl.jsonl", ROWS)
    with pytest.raises(DataError, match="directory of a run") as error:
        probe.command(str(shop / "model"), [str(path)], None, None)
    assert error.value.exit_code == 2
