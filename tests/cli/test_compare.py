"""`retain compare` on a tiny model: a run per set of methods, one baseline for all, one line per mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from run_kit import settings, write_config
from typed import refused, retain

from retain.cli import main
from retain.config import parse
from retain.pipeline import run
from retain.results import load_items, load_metrics, load_results
from retain.rundir import RunDirectory

NAIVE, REPLAY = "naive=[lora: {r: 4}]", "replay=[lora: {r: 4}, replay: {fraction: 0.25}]"
FILES = ("compare.html", "compare.md", "compare.svg")


def short(shop: Path, output: Path, **changes: object) -> dict:
    """Settings of a run of one task and a few steps."""
    values = settings(shop, output, tasks=[str(shop / "count")], **changes)
    return values | {"train": values["train"] | {"max_steps": 3}}


def numbers(place: Path) -> dict:
    """All of a run's results apart from when and by which words it was made."""
    drop = {"created", "command", "name", "training"}
    return load_results(place).model_dump(exclude=drop)


@pytest.fixture(scope="module")
def compared(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(YAML file, folder of the comparison) of two sets that were carried out."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    config = write_config(folder.parent / "run.yaml", short(shop, folder.parent / "alone"))
    with pytest.MonkeyPatch.context() as patch:
        retain(patch, "compare", config, "--methods", NAIVE, "--methods", REPLAY, "--output", folder)
    return config, folder


def test_each_set_is_a_run_and_the_base_is_asked_once(compared: tuple[Path, Path], shop: Path, tmp_path: Path) -> None:
    _, folder = compared
    for name in FILES:
        assert (folder / name).stat().st_size > 0
    naive, replay = folder / "naive", folder / "replay"
    assert [list(load_results(place).methods) for place in (naive, replay)] == [["lora"], ["lora", "replay"]]
    looked = [{look["stage"] for look in load_metrics(place) if look["kind"] == "look"} for place in (naive, replay)]
    assert looked == [{"00-base", "01-count"}, {"01-count"}]
    assert load_items(RunDirectory(naive).items("00-base")) == load_items(RunDirectory(replay).items("00-base"))
    alone = short(shop, tmp_path / "alone", methods=[{"lora": {"r": 4}}, {"replay": {"fraction": 0.25}}])
    run(parse(alone), lambda line: None)
    assert numbers(replay) == numbers(tmp_path / "alone")


def test_the_table_and_the_page_name_both(compared: tuple[Path, Path], monkeypatch, capsys) -> None:
    _, folder = compared
    for name in FILES:
        (folder / name).unlink()
    monkeypatch.chdir(folder)
    retain(monkeypatch, "compare", "naive", "replay")  # as directories: written beside the first run
    shown = capsys.readouterr().out
    assert "lost vs naive" in shown
    assert "reference" in shown
    assert "Picture and table: compare.html" in shown
    for name in FILES:
        text = (folder / name).read_text(encoding="utf-8")
        assert "naive" in text
        assert "replay" in text


def test_in_chinese(compared: tuple[Path, Path], monkeypatch, capsys, tmp_path: Path) -> None:
    _, folder = compared
    words = ["compare", folder / "naive", folder / "replay", "--output", tmp_path / "zh"]
    retain(monkeypatch, *words, "--lang", "zh")
    assert "相对" in capsys.readouterr().out
    assert 'lang="zh-CN"' in (tmp_path / "zh" / "compare.html").read_text(encoding="utf-8")
    assert "unknown 'fr'" in refused(monkeypatch, capsys, *words, "--lang", "fr")


def test_done_again_nothing_is_trained_or_asked(compared: tuple[Path, Path], monkeypatch) -> None:
    config, folder = compared
    kept = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".parquet", ".jsonl")]
    before = {path: path.stat().st_mtime_ns for path in kept if "/probes/count" not in path.as_posix()}
    assert len(before) > 6
    retain(monkeypatch, "compare", config, "--methods", NAIVE, "--methods", REPLAY, "--output", folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_stopped_and_started_again(compared: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    """Stopped at the end of the second training: the first run stays, the second ends as if nothing had happened."""
    config, folder = compared
    words = ["compare", config, "--methods", NAIVE, "--methods", REPLAY, "--output", tmp_path / "both"]
    save = RunDirectory.save_task

    def stop(self, *rest):
        if self.path.name == "replay":
            raise KeyboardInterrupt
        return save(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_task", stop)
        patch.setattr(sys, "argv", ["retain", *map(str, words)])
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            main()
    assert not (tmp_path / "both" / "compare.html").exists()
    done = tmp_path / "both" / "naive" / "tasks" / "01-count" / "done.json"
    stamp = done.stat().st_mtime_ns
    retain(monkeypatch, *words)
    assert done.stat().st_mtime_ns == stamp
    for name in ("naive", "replay"):
        assert numbers(tmp_path / "both" / name) == numbers(folder / name)
    assert (tmp_path / "both" / "compare.html").is_file()


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ([], "0 of --methods given. Give at least two sets: --methods 'naive=[lora]'"),
        ([NAIVE], "1 of --methods given"),
        ([NAIVE, "[lora]"], "'[lora]' given. Expected NAME=METHODS"),
        ([NAIVE, "a/b=[lora]"], "'a/b=[lora]' given. Expected NAME=METHODS"),
        ([NAIVE, "Naive=[none]"], "--methods Naive: two sets have this name"),
        ([NAIVE, "bad=[lora"], "--methods bad: '[lora' is not YAML"),
        ([NAIVE, "bad="], "--methods bad: methods"),
        ([NAIVE, "bad=[lorra]"], "--methods bad: methods: unknown 'lorra'. Did you mean 'lora'?"),
        ([NAIVE, "bad=[lora: {rank: 4}]"], "--methods bad: "),
        ([NAIVE, "bad=[ewc, l2sp]"], "--methods bad: "),
    ],
)
def test_bad_sets(shop, tmp_path, monkeypatch, capsys, methods, said) -> None:
    config = write_config(tmp_path / "run.yaml", short(shop, tmp_path / "runs" / "alone"))
    words = [word for entry in methods for word in ("--methods", entry)]
    assert said in refused(monkeypatch, capsys, "compare", config, *words)
    assert not (tmp_path / "runs").exists()


def test_bad_words(compared: tuple[Path, Path], tmp_path, monkeypatch, capsys) -> None:
    config, folder = compared
    sets = ["--methods", NAIVE, "--methods", REPLAY]
    assert "Give one YAML file" in refused(monkeypatch, capsys, "compare", config, folder / "naive", *sets)
    assert "no such file" in refused(monkeypatch, capsys, "compare", tmp_path / "no.yaml", *sets)
    places = [folder / "naive", folder / "replay"]
    assert "--set" in refused(monkeypatch, capsys, "compare", *places, "-o", "seed=1")
    other = ["--methods", "naive=[none]", "--methods", REPLAY, "--output", folder]
    assert "run with other `methods`" in refused(monkeypatch, capsys, "compare", config, *other)


def test_directories_of_different_tasks(compared: tuple[Path, Path], shop, tmp_path, monkeypatch, capsys) -> None:
    _, folder = compared
    values = short(shop, tmp_path / "which", methods=["none"]) | {"tasks": [str(shop / "which")]}
    run(parse(values), lambda line: None)
    line = refused(monkeypatch, capsys, "compare", folder / "naive", tmp_path / "which")
    assert "'which' learned which; 'naive' count" in line


def test_help_shows_the_form_as_it_is_typed(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    retain(monkeypatch, "compare", "--help")
    assert "--methods 'naive=[lora]' --methods 'replay=[lora, replay: {fraction: 0.3}]'" in capsys.readouterr().out


@pytest.fixture(scope="module")
def asked(compared, shop, tmp_path_factory) -> tuple[Path, list]:
    """(folder, models) of a comparison of any models: a base, and two runs from it."""
    folder = tmp_path_factory.mktemp("models") / "asked"
    base = load_results(compared[1] / "naive").model
    models = [base, compared[1] / "naive", compared[1] / "replay"]
    with pytest.MonkeyPatch.context() as patch:
        retain(patch, "compare", *models, "--probes", shop / "probes.jsonl", "--output", folder)
    return folder, models


def test_any_models_are_asked_the_same(asked, compared):
    folder, _ = asked
    first = load_results(folder / "naive")
    of_run = load_results(compared[1] / "naive")
    probes = {info.name for info in first.probes}
    assert first.stages[1] == "01-naive"
    assert probes < {info.name for info in of_run.probes}
    # the run asked the same questions of the same weights, before and after
    ours = {c.probe: (c.before, c.after, c.lost, c.gained) for c in first.changes}
    assert ours == {c.probe: (c.before, c.after, c.lost, c.gained) for c in of_run.changes if c.probe in probes}
    assert all(c.forgetting_raw is not None for c in first.changes if c.probe == "animals")
    page = (folder / "naive" / "report.html").read_text()
    assert "replay" in page, "the others stand beside it"
    assert (folder / "replay" / "report.md").is_file()


def test_models_are_not_asked_twice_unless_their_weights_changed(asked, shop, monkeypatch, capsys, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder, models = asked
    words = ("compare", *models, "--probes", shop / "probes.jsonl", "--output", folder)
    retain(monkeypatch, *words)
    assert capsys.readouterr().out.count("answers from before") == 3
    other = tmp_path / "naive"
    shutil.copytree(models[0], tmp_path / "base")
    retain(monkeypatch, "compare", tmp_path / "base", models[1], "-p", shop / "probes.jsonl", "--output", other)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    retain(monkeypatch, "compare", tmp_path / "base", models[1], "-p", shop / "probes.jsonl", "--output", other)
    assert capsys.readouterr().out.count("answers from before") == 1


def test_questions_that_were_edited_are_asked_anew(asked, monkeypatch, capsys, tmp_path):
    """A row may keep its id while its text changes."""
    _, models = asked
    rows = [{"id": f"q{i}", "prompt": f"Say {i}.", "answers": [str(i)]} for i in range(3)]
    words = ("compare", *models[:2], "--probes", tmp_path / "own.jsonl", "--output", tmp_path / "out")
    for text, kept in (("Say", 0), ("Say", 2), ("Tell me", 0)):
        lines = [json.dumps(row | {"prompt": row["prompt"].replace("Say", text)}) + "\n" for row in rows]
        (tmp_path / "own.jsonl").write_text("".join(lines))
        retain(monkeypatch, *words)
        assert capsys.readouterr().out.count("answers from before") == kept


def test_models_and_runs_take_their_own_options(asked, compared, shop, monkeypatch, capsys, tmp_path):
    _, models = asked
    line = refused(monkeypatch, capsys, "compare", models[0], "-p", shop / "probes.jsonl", "--output", tmp_path)
    assert "Give at least two" in line
    line = refused(monkeypatch, capsys, "compare", compared[0], "--methods", NAIVE, "--probes", "core")
    assert line.startswith("retain: --probes: for models alone")
    monkeypatch.setattr("retain.measuring.answers", lambda *a: pytest.fail("a model was asked before the other opened"))
    line = refused(monkeypatch, capsys, "compare", models[0], tmp_path / "nowhere", "--output", tmp_path)
    assert "nowhere" in line
    line = refused(monkeypatch, capsys, "retention", models[0], tmp_path / "nowhere", "-p", shop / "probes.jsonl")
    assert "nowhere" in line
    line = refused(monkeypatch, capsys, "compare", *models, "--set", "seed=1", "-p", "core")
    assert line.startswith("retain: --set: models are asked as they are")
