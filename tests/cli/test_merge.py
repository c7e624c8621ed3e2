"""`retain merge`: what it writes and says, the comparison with --probe, experts of a library, runs, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from expert_kit import library
from merge_kit import changes, weights, write_adapter, write_model
from run_kit import settings
from typed import refused, retain

from retain.config import parse
from retain.pipeline import load_run, run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli-merge")
    write_model(folder / "base", 0)
    for seed in (1, 2):
        write_model(folder / f"model{seed}", seed)
        write_adapter(folder / f"adapter{seed}", folder / "base", seed)
    questions = [
        {"probe": "animals", "prompt": f"Which animal {i}? Answer:", "choices": [" bird", " ship"], "answer": i % 2}
        for i in range(8)
    ]
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def test_models_are_merged_and_asked_beside_their_base(place, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    words = ["model1", "model2", "--base", "base", "--method", "task", "--weights", "0.3,0.6", "--to", tmp_path / "out"]
    retain(monkeypatch, "merge", *words, "--probe", "probes.jsonl", "--output", tmp_path / "compare")
    shown = capsys.readouterr().out
    head = next(line for line in shown.splitlines() if line.startswith("probe"))
    assert head.split() == ["probe", "base", "model1", "model2", "out", "out", "−", "base"]
    assert "animals" in shown
    assert (tmp_path / "compare" / "out" / "report.html").is_file()
    base, one, two = (weights(place / name) for name in ("base", "model1", "model2"))
    for name, found in weights(tmp_path / "out").items():
        torch.testing.assert_close(found, base[name] + 0.3 * (one[name] - base[name]) + 0.6 * (two[name] - base[name]))


def test_adapters_become_one_and_what_was_cut_is_said(place, tmp_path, monkeypatch, capsys) -> None:
    adapters = [place / "adapter1", place / "adapter2"]
    retain(monkeypatch, "merge", *adapters, "--to", tmp_path / "mean")
    assert "Rank 8" in (shown := " ".join(capsys.readouterr().out.split()))
    assert "exactly the merged change" in shown
    one, two = (changes(place / "base", adapter) for adapter in adapters)
    for name, found in changes(place / "base", tmp_path / "mean").items():
        torch.testing.assert_close(found, (one[name] + two[name]) / 2, rtol=1e-4, atol=2e-6)
    retain(monkeypatch, "merge", *adapters, "-m", "dare", "--seed", 3, "--to", tmp_path / "dare")
    assert "% of the squared norm of the merged change" in " ".join(capsys.readouterr().out.split())


def test_experts_of_a_library(tiny_folder, tmp_path, monkeypatch) -> None:
    books = library(tiny_folder, tmp_path / "experts")
    retain(monkeypatch, "merge", "medicine", "poems", "--library", tmp_path / "experts", "--to", tmp_path / "out")
    parts = [changes(tiny_folder, books.path(name)) for name in ("medicine", "poems")]
    for name, found in changes(tiny_folder, tmp_path / "out").items():
        torch.testing.assert_close(found, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=2e-6)


def test_a_run_is_what_load_run_makes_of_it(shop, tmp_path, monkeypatch) -> None:
    """Two tasks, an adapter each, the second on top of the first."""
    values = settings(shop, tmp_path / "run", methods=[{"lora": {"r": 2}}])
    values["train"] = values["train"] | {"max_steps": 2, "learning_rate": 0.05}
    run(parse(values), lambda line: None)
    words = [tmp_path / "run", "--method", "interpolate", "--weights", "1"]
    retain(monkeypatch, "merge", *words, "--to", tmp_path / "adapter")
    retain(monkeypatch, "merge", *words, "--as", "model", "--to", tmp_path / "model")
    expected, before = load_run(tmp_path / "run")[0].state_dict(), weights(shop / "model")
    assert any(bool((expected[name] != before[name]).any()) for name in before)
    change, whole = changes(shop / "model", tmp_path / "adapter"), weights(tmp_path / "model")
    for name in before:
        torch.testing.assert_close(whole[name], expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(before[name] + change[name].float(), expected[name], rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_line(place, tmp_path, monkeypatch, capsys) -> None:
    models = [place / "model1", place / "model2"]
    to = ["--to", tmp_path / "out"]
    said = {
        ("--weights", "a,b"): "--weights: 'a,b' given",
        ("--weights", "1"): "1 given for 2 models",
        ("--method", "average"): "unknown 'average'",
        ("--method", "ties"): "Give it with --base",
        ("--as", "adapter"): "not all adapters of one base",
        ("--as", "file"): "allowed: adapter, model",
        ("--limit", "3"): "are for --probe",
        ("--probe", "nowhere.jsonl"): "nowhere.jsonl",
    }
    for words, answer in said.items():
        assert answer in refused(monkeypatch, capsys, "merge", *models, *to, *words)
    assert "is no folder that is there" in refused(monkeypatch, capsys, "merge", "x", *to, "--library", tmp_path)
    assert "exists already" in refused(monkeypatch, capsys, "merge", *models, "--to", place / "base")
    assert not list(tmp_path.iterdir())
