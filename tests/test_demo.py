"""The demo from its data to its report and its sentence, with the tiny model in place of the starter."""

from __future__ import annotations

import json

import pytest

from retain import demo
from retain.config import DEFAULT_METHODS
from retain.data import demo_tasks
from retain.probes.suite import load_probes
from retain.results import load_items, load_results


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETAIN_CACHE", str(tiny_folder.parent))
        said: list[str] = []
        found = demo.run_demo(folder, said.append, rows=8, items=4)
        spoken = demo.answers({name: folder / name for name in ("naive", "retained")})
    return folder, found, said, spoken


def test_what_is_asked_is_answered_in_words_at_both_ends(tmp_path):
    both = demo.configs(tmp_path)
    assert both["naive"].probes == both["retained"].probes
    asked = both["naive"].probes
    assert asked.between == "tasks"
    sources = [(one, {}) if isinstance(one, str) else (one.data, one.given()) for one in asked.reference]
    probes = [probe for source, options in sources for probe in load_probes(source, asked.limit, **options)]
    assert {probe.kind for probe in probes} == {"answer", "instruction"}  # what the demo's sentence counts
    assert sum(len(probe.items) for probe in probes) == 126
    assert both["retained"].methods == DEFAULT_METHODS


@pytest.mark.slow
def test_both_runs_learn_the_same_rows_and_share_the_baseline(shown):
    folder, found, _, _ = shown
    assert found.naive.tasks == found.retained.tasks == list(demo_tasks.NAMES)
    for name in demo_tasks.NAMES:
        rows = [json.loads(line) for line in (folder / "data" / name / "train.jsonl").read_text().splitlines()]
        assert len(rows) == 8
    base = [load_items(folder / name / "probes" / f"{found.naive.stages[0]}.parquet") for name in ("naive", "retained")]
    assert base[0] == base[1]


@pytest.mark.slow
def test_the_comparison_is_that_of_the_written_items(shown):
    folder, found, _, _ = shown
    written = {p.name for p in found.naive.probes if p.role == "reference" and p.kind in ("answer", "instruction")}

    def mean(run: str, stage: str) -> float:
        rows = load_items(folder / run / "probes" / f"{stage}.parquet")
        by_probe = {name: [row["score"] for row in rows if row["probe"] == name] for name in written}
        return sum(sum(scores) / len(scores) for scores in by_probe.values()) / len(by_probe)

    base = mean("naive", found.naive.stages[0])
    assert found.comparison.lost_a.value == pytest.approx(base - mean("naive", found.naive.stages[-1]))
    assert found.comparison.lost_b.value == pytest.approx(base - mean("retained", found.retained.stages[-1]))
    assert demo.sentence(found).startswith("On generated answers the naive run lost ")


@pytest.mark.slow
def test_three_models_answer_and_the_report_shows_both_runs(shown):
    folder, found, _, spoken = shown
    assert list(spoken) == ["base", "naive", "retained"]
    assert all(len(answers) == len(demo.QUESTIONS) for answers in spoken.values())
    text = found.report.read_text(encoding="utf-8")
    assert found.report == folder / "retained" / "report.html"
    assert "naive" in text
    assert load_results(folder / "retained").finished
