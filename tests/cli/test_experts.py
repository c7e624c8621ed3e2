"""`retain experts` on a tiny model: from training to files for other programs, and one line per mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from expert_kit import adapter, alone
from run_kit import response_rows, write_lines
from typed import speaking

from retain.experts.library import ExpertLibrary
from retain.experts.pool import open_pool
from retain.pipeline import load_run
from retain.results import load_results
from retain.rundir import RunDirectory

SHORT = ["-o", "probes.limit=2", "-o", "train={max_steps: 2, max_length: 64, use_cpu: true, bf16: false}"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with data and an adapter; it fills as the tests go on."""
    folder = tmp_path_factory.mktemp("experts")
    write_lines(folder / "data" / "count.jsonl", response_rows(24))
    adapter(tiny_folder, folder / "given", 8, ["q_proj", "o_proj"])
    return folder


@pytest.fixture
def retain(desk: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`retain(*words)` runs a command on the desk: what it printed, or with `refused` the one line of the error."""
    monkeypatch.chdir(desk)
    monkeypatch.setenv("COLUMNS", "140")

    return speaking(monkeypatch, capsys, "experts")


def test_train_adds_what_it_learned_and_lost(retain, desk: Path) -> None:
    words = ["--description", "Counts.", "--language", "en", "--keywords", "count, number", "--examples", "4"]
    said = retain("train", "counting", "--data", "data/count.jsonl", *words, *SHORT, "-o", "methods=[lora: {r: 4}]")
    assert "Report: runs/counting/report.html" in said
    assert "Expert: experts/counting" in said
    card = ExpertLibrary(desk / "experts").card("counting")
    results = load_results(desk / "runs" / "counting")
    assert card.base == "starter"
    assert (card.description, card.language, card.keywords) == ("Counts.", "en", ["count", "number"])
    assert card.forgetting is not None
    assert results.verdict is not None
    assert card.forgetting.sentence == results.verdict.sentence
    assert results.tasks == ["counting"]
    assert len(card.probes) == len(results.changes) > 2
    assert len(card.examples) == 4
    pool, _ = open_pool(ExpertLibrary(desk / "experts"))
    learned, _ = load_run(desk / "runs" / "counting")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = pool.model(ids).logits
        pool.activate("counting")
        torch.testing.assert_close(pool.model(ids).logits, learned.eval()(ids).logits)
        assert not torch.equal(pool.model(ids).logits, plain)


def test_add_takes_a_run_or_a_folder(retain, desk: Path) -> None:
    (desk / "questions.txt").write_text("What is far?\nWhat is near?\n")
    assert "2 examples" in retain("add", "given", "given", "--examples-from", "questions.txt")
    assert "rank 4" in retain("add", "again", "runs/counting", "--examples", "0")
    books = ExpertLibrary(desk / "experts")
    assert books.names() == ["again", "counting", "given"]
    assert books.card("given").examples == ["What is far?", "What is near?"]
    assert books.card("again").digest == books.card("counting").digest


def test_list_and_show(retain) -> None:
    said = retain("list")
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert "Counts. (en)" in lines["counting"]
    assert lines["given"].count("–") == 2
    assert "base starter" in said
    shown = retain("show", "counting")
    assert "data/count.jsonl" in shown
    assert "count, number" in shown
    assert "lora" in shown
    assert "no experts yet" in retain("list", "--library", "other")


def test_rename_remove_export(retain, desk: Path, tiny_folder: Path) -> None:
    retain("rename", "again", "more")
    retain("remove", "more")
    books = ExpertLibrary(desk / "experts")
    assert books.names() == ["counting", "given"]
    retain("export", "given", "--to", "plain")
    ids = torch.arange(8)[None]
    assert torch.equal(alone(tiny_folder, desk / "plain")(ids).logits, alone(tiny_folder, desk / "given")(ids).logits)
    assert "serve.sh" in retain("export", "--vllm", "--to", "engine")
    text = (desk / "engine" / "serve.sh").read_text()
    assert "--max-lora-rank 8" in text
    assert "counting=adapters/counting" in text


def test_the_library_may_lie_elsewhere(retain, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETAIN_EXPERTS", str(desk / "shelf"))
    retain("add", "one", "given")
    assert ExpertLibrary(desk / "shelf").names() == ["one"]
    assert "one" in retain("list")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "auto", "given"], "expert name: 'auto'"),
        (["add", "../x", "given"], "expert name"),
        (["add", "given", "given"], "is there already"),
        (["add", "x", "nowhere"], "no adapter_config.json"),
        (["add", "x", "runs/counting", "--base", "starter"], "a run knows its base"),
        (["add", "x", "given", "--examples-from", "no.txt"], "no.txt"),
        (["show", "count"], "Did you mean 'counting'"),
        (["remove", "x"], "unknown 'x'"),
        (["rename", "given", "base"], "expert name: 'base'"),
        (["rename", "given", "counting"], "is there already"),
        (["export", "--to", "somewhere"], "0 experts named"),
        (["export", "given", "counting", "--to", "somewhere"], "2 experts named"),
        (["export", "given", "--to", "data"], "exists already"),
        (["export", "--vllm", "x", "--to", "somewhere"], "unknown 'x'"),
        (["train", "given", "--data", "data/count.jsonl"], "is there already"),
        (["train", "none", "--data", "data/count.jsonl"], "expert name: 'none'"),
        (["train", "x", "--data", "data/count.jsonl", "-o", "methods=[lora: {dora: true}]"], "a plain LoRA"),
        (["train", "x", "--data", "data/count.jsonl", "-o", "methods=[lora: {kind: ia3}]"], "a plain LoRA"),
        (["train", "x", "--data", "data/count.jsonl", "-o", "methods=[ewk]"], "Did you mean 'ewc'"),
        (["train", "x", "--data", "data/count.jsonl", "-o", "tasks=[a, b]"], "an expert learns one"),
        (["train", "x", "--data", "data/no.jsonl"], "data/no.jsonl"),
    ],
)
def test_mistakes_are_one_line(retain, words: list[str], said: str, desk: Path) -> None:
    assert said in retain(*words, refused=True)
    assert ExpertLibrary(desk / "experts").names() == ["counting", "given"]
    assert not (desk / "somewhere").exists()


def test_another_base_is_refused_before_the_training(retain, desk: Path) -> None:
    from tiny import tiny_model, tiny_tokenizer

    tiny_model(tiny_tokenizer(), seed=3).save_pretrained(desk / "other")
    tiny_tokenizer().save_pretrained(desk / "other")
    line = retain("train", "x", "--data", "data/count.jsonl", "--model", "other", refused=True)
    assert "one library per base" in line
    assert not (desk / "runs" / "x").exists()


def test_without_lora_it_is_put_first(retain, desk: Path) -> None:
    preset = ["-o", "methods=[label_smoothing]", "--examples-from", "questions.txt"]
    retain("train", "smooth", "--data", "data/count.jsonl", *SHORT, *preset)
    config = RunDirectory(desk / "runs" / "smooth").read_config()
    assert [next(iter(m)) if isinstance(m, dict) else m for m in config.methods] == ["lora", "label_smoothing"]
    card = json.loads((desk / "experts" / "smooth" / "card.json").read_text())
    assert card["examples"] == ["What is far?", "What is near?"]
