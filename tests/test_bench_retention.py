"""The bench on real rows, on a tiny model and invented rows: it resumes, weighs and compares as it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from run_kit import choice_rows, response_rows, write_lines

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import learnable  # noqa: E402
import retention  # noqa: E402
import retention_runs  # noqa: E402
from retention_runs import FAMILIES, Bench, Recipe  # noqa: E402

from retain import methods  # noqa: E402
from retain.results import load_items  # noqa: E402
from retain.rundir import BASE, RunDirectory  # noqa: E402

TRAIN = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 0.03}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder as `--data` wants it."""
    folder = tmp_path_factory.mktemp("data")
    for split, count, offset in (("train", 12, 0), ("test", 6, 100)):
        rows = response_rows(count, offset)
        mine = [row | {"task": FAMILIES[i % 2]} for i, row in enumerate(rows)]
        write_lines(folder / "reasoning_gym" / f"{split}.jsonl", [*mine, *(r | {"task": "hard"} for r in rows)])
    for name in retention_runs.KEPT:
        rows = response_rows(4, 300) if name.startswith("facts") else choice_rows(4)
        write_lines(folder / name / "test.jsonl", rows)
    write_lines(folder / "dolly" / "train.jsonl", response_rows(8, 500))
    return folder


@pytest.fixture
def bench(data, tiny_folder, tmp_path, monkeypatch) -> Bench:
    """The bench on the tiny model, with few recipes and few probes."""
    monkeypatch.setattr(retention_runs, "KEPT", ("arc_easy", "facts_countries"))
    mine = [
        Recipe("naive", ["none"]),
        Recipe("naive-alpha-0.5", ["none"], alpha=0.5, after="naive"),
        Recipe("replay", [{"replay": {"fraction": 0.5, "source": "old"}}], old="dolly"),
    ]
    for module in (retention, retention_runs):
        monkeypatch.setattr(module, "recipes", lambda: mine)
    real = Bench.config

    def config(self, recipe, seed):
        found = real(self, recipe, seed)
        probes = found.probes.model_copy(update={"reference": found.probes.reference[1:]})  # core takes a while
        return found.model_copy(update={"probes": probes})

    monkeypatch.setattr(Bench, "config", config)
    return Bench(data, tmp_path / "work", tmp_path / "results", str(tiny_folder), 4, train=TRAIN, say=lambda line: None)


def options(bench: Bench, *more: str) -> list[str]:
    return [
        *("--data", str(bench.data), "--work", str(bench.work), "--results", str(bench.results)),
        *("--model", bench.model, "--items", "4", "--train", json.dumps(TRAIN), "--seeds", "0", "1"),
        *("--page", str(bench.results / "retention.md"), *more),
    ]


def test_the_command_runs_resumes_and_writes(bench, capsys):
    assert retention.main(options(bench, "--plan")) == 0
    assert capsys.readouterr().out.startswith("6 runs remain, about 0.3 hours.")
    assert retention.main(options(bench, "--budget-minutes", "0")) == 1, "nothing may begin, nothing is there"
    assert retention.main(options(bench, "--only", "naive", "naive-alpha-0.5")) == 0
    assert not bench.folder("naive", 0).exists(), "weights that nothing needs are dropped"
    assert "needs two seeds" not in (bench.results / "retention.md").read_text()
    assert retention.main(options(bench)) == 0
    text = (bench.results / "retention.md").read_text()
    assert "| `replay` | full | 2 |" in text
    assert (bench.results / "retention.svg").read_text().startswith("<")
    assert retention.main(options(bench, "--plan")) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("0 runs remain")
    names = {path.name for path in bench.results.glob("*.json")}
    expected = {f"{name}-seed{seed}.json" for name in ("naive", "naive-alpha-0.5", "replay") for seed in (0, 1)}
    assert names == {"base.json", *expected}


def test_ends_of_the_interpolation_are_the_base_and_the_run(bench):
    recipe = retention_runs.recipes()[0]
    last = retention_runs._trained(bench, recipe, 0)
    config = bench.config(recipe, 0)
    base = load_items(RunDirectory(config.directory).items(BASE))
    ends = {0.0: base, 1.0: load_items(last)}

    def said(rows):
        return [(row["probe"], row["item"], row["output"], row["score"], row["details"]) for row in rows]

    assert said(ends[0.0]) != said(ends[1.0]), "training must have moved something"
    for alpha, expected in ends.items():
        assert said(retention_runs._between(bench, recipe, 0, alpha)) == said(expected)


def test_only_the_chosen_families_are_learned(bench):
    rows = [json.loads(line) for line in (bench._rows() / "train.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == set(FAMILIES[:2])


def test_probes_count_the_same_whatever_their_size():
    base = {
        "probes": {
            "long": {"role": "reference", "share": True, "up": True},
            "short": {"role": "reference", "share": True, "up": False},
            "prose": {"role": "reference", "share": False, "up": False},
            "new": {"role": "task", "share": True, "up": True},
        },
        "scores": {"long": "11111111", "short": "00", "prose": [3.0], "new": [0.25, 0.5]},
    }
    run = {"long": "11110000", "short": "01", "prose": [9.0], "new": [0.75, 0.5]}
    kept = retention.changes(base, [run, base["scores"]], "reference")
    assert kept.shape == (2, 10)
    assert kept.mean(1) == pytest.approx([(-4 / 8 - 1 / 2) / 2, 0.0])
    assert retention.changes(base, [run], "task").mean() == pytest.approx(0.25)


def test_scores_are_short_where_they_can_be():
    rows = [{"probe": p, "score": s} for p, s in (("a", 1.0), ("b", 0.5), ("a", 0.0), ("b", 1.0))]
    rows += [{"probe": retention_runs.TASK, "score": 1.0, "details": json.dumps({"exact_match": e})} for e in (0, 1)]
    found = retention_runs.scores(rows)
    assert found == {"a": "10", "b": [0.5, 1.0], retention_runs.TASK: "01"}, "of the task the exact answer counts"
    assert retention._array(found["a"]).tolist() == [1.0, 0.0]


def test_one_seed_gives_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "recipes", lambda: [Recipe("naive", ["none"]), Recipe("ewc", ["ewc"])])
    about = {"role": "reference", "share": True, "up": True}
    scores = {"kept": "1" * 20, "new": "0" * 20}
    base = {"machine": "a CPU", "probes": {"kept": about, "new": about | {"role": "task"}}, "scores": scores}
    retention_runs.write(tmp_path / "base.json", json.dumps(base))
    for name, kept in (("naive", "0"), ("ewc", "1")):
        for seed in (0, 1):
            run = {"scores": {"kept": "1" * 10 + kept * 10, "new": "1" * 20}}
            retention_runs.write(tmp_path / f"{name}-seed{seed}.json", json.dumps(run))
    assert "needs two seeds" in retention.page(retention.rows(tmp_path, [0]), [0], base)
    both = {row.recipe.name: row for row in retention.rows(tmp_path, [0, 1])}
    assert both["ewc"].found.word == "forgets less"
    assert both["ewc"].found.difference.value == pytest.approx(-0.5)
    assert both["naive"].percent_kept().value == pytest.approx(50)
    assert np.isfinite([both["ewc"].percent_kept().low, both["naive"].lost.high]).all()


def test_where_nothing_is_learned_there_is_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "recipes", lambda: [Recipe("naive", ["none"]), Recipe("ewc", ["ewc"])])
    about = {"role": "reference", "share": True, "up": True}
    base = {"machine": "a CPU", "probes": {"kept": about, "new": about | {"role": "task"}},
            "scores": {"kept": "1" * 20, "new": "01" * 10}}  # fmt: skip
    retention_runs.write(tmp_path / "base.json", json.dumps(base))
    for name, kept in (("naive", "0"), ("ewc", "1")):
        for seed, new in enumerate(("01" * 10, "01" * 9 + "10")):
            run = {"scores": {"kept": "1" * 10 + kept * 10, "new": new}}
            retention_runs.write(tmp_path / f"{name}-seed{seed}.json", json.dumps(run))
    found = {row.recipe.name: row for row in retention.rows(tmp_path, [0, 1])}
    assert found["ewc"].found.word == retention.NOTHING
    assert found["ewc"].saved.value == pytest.approx(0.5)
    assert found["naive"].saved is None
    line = next(x for x in retention.page(list(found.values()), [0, 1], base).splitlines() if x.startswith("| `ewc`"))
    assert line.endswith("|  | no new score to compare at |")


def test_real_recipes_can_be_built(monkeypatch):
    from retain.methods.base import Stack

    found = retention_runs.recipes()
    named = {recipe.name: recipe for recipe in found}
    for recipe in found:
        Stack(methods.build(recipe.methods))
        assert recipe.after is None or named[recipe.after].alpha is None
    assert sum(r.name.startswith("naive") and r.alpha is None and "num_train_epochs" not in r.train for r in found) == 3
    assert {"naive-early", "dolly-5", "basic", "advanced", "medical"} <= set(named)


def test_presets_bring_methods_and_rates_but_not_the_length(tmp_path, monkeypatch):
    monkeypatch.setattr(retention_runs, "PRESETS", tmp_path)
    text = "methods: [ewc, {replay: {fraction: 0.1}}]\ntrain: {learning_rate: 0.5, num_train_epochs: 9}\n"
    (tmp_path / "basic.yaml").write_text(text)
    expected = Recipe("basic", ["ewc", {"replay": {"fraction": 0.1}}], {"learning_rate": 0.5})
    assert retention_runs.preset("basic") == expected, "the length of the training is the bench's"


def test_learnable_families_are_found_on_training_rows(tiny_folder, tmp_path, monkeypatch, capsys):
    """Questions with one answer are learned; a family with long rows is left out."""
    same = [{"prompt": f"What do we sell to {i}?", "response": "tea", "task": "easy"} for i in range(30)]
    other = [{"prompt": f"Number {i}?", "response": str(1000 + 37 * i), "task": "hard"} for i in range(20)]
    long = [{"prompt": "word " * 300, "response": "tea", "task": "long"}] * 20
    write_lines(tmp_path / "train.jsonl", [*same, *other, *long])
    monkeypatch.setattr(learnable, "SETTINGS", {"full-0.01": (["none"], 0.01)})
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--model", str(tiny_folder), "--epochs", "20"]
    monkeypatch.setattr(sys, "argv", ["learnable.py", *arguments, "--seeds", "0", "1"])
    learnable.main()
    said = capsys.readouterr().out
    assert said.rstrip().endswith("Learned: easy")
    assert "| easy | 0 | 100 | 100 [100, 100] |" in said
    assert "long" not in said
    asked = (tmp_path / "out" / "rows" / "test.jsonl").read_text().splitlines()
    assert len(asked) == 2 * learnable.HELD
