"""`retain synth`: the rows a run would write itself, in a file that a run can replay; nothing lost on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from run_kit import environment, in_many_calls, response_rows, write_lines
from tiny import tiny_model, tiny_tokenizer
from typed import retain

from retain.cli import main
from retain.models import generation
from retain.models.generation import Generated

WORDS = ("river", "stone", "music", "garden", "winter", "paper", "engine", "ocean", "candle", "forest", "bridge")
SMALL = ["--number", "8", "--max-tokens", "64", "--seed", "2"]


@pytest.fixture
def synth(tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`synth(*words)` runs the command in an empty folder: (exit code, what it printed, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def start(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["retain", "synth", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return start


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_help_is_there_without_torch() -> None:
    code = (
        "import sys, retain.cli as c; c._commands(); "
        "from typer.testing import CliRunner as R; r = R().invoke(c.app, ['synth', '--help']); "
        "print(r.exit_code, '--max-tokens' in r.output, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment() | {"COLUMNS": "100"}
    )
    assert done.stdout.strip() == "0 True False", done.stdout + done.stderr


def test_the_file_holds_what_a_run_would_write(synth, tiny_folder: Path, tmp_path: Path) -> None:
    import torch

    from retain.data.chat import to_chat
    from retain.data.sources import load_rows
    from retain.methods.context import self_written
    from retain.models.load import load_model
    from retain.models.params import computes_bf16

    code, said, _ = synth("--out", "new/old.jsonl", *SMALL)
    assert code == 0
    model, tokenizer = load_model(str(tiny_folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16, computes_bf16(device)):  # as a run with default settings
        own = self_written(model.to(device), tokenizer, tmp_path / "buffer", 8, 2, lambda line: None, 64)
    rows = to_chat(load_rows("new/old.jsonl"), "old")
    assert rows.to_list() == own.to_list()
    assert len(rows) >= 1
    assert f"{len(rows)} of " in said
    assert "dropped: " in said
    assert "-o old=new/old.jsonl" in said
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["old.jsonl"]


def test_seed_and_temperature_matter_and_are_all_that_does(synth) -> None:
    found = {}
    for name, words in {"a": [], "b": [], "c": ["--seed", "4"], "d": ["--temperature", "0.5"]}.items():
        assert synth("--out", f"{name}.jsonl", *SMALL, *words)[0] == 0
        found[name] = Path(f"{name}.jsonl").read_bytes()
    assert found["a"] == found["b"]
    assert len({found[name] for name in "acd"}) == 3


def test_rows_repeat_no_item_of_the_probes(synth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the suite that a run asks by itself, or of those that are named."""
    said = ["What is the capital of Portugal?", "Paint the small garden gate green"]
    write_lines(tmp_path / "mine.jsonl", [{"prompt": said[1], "answers": ["yes"]}])
    speak(monkeypatch, quotes=said)
    for name, probes, stays in (("a", [], [1]), ("b", ["mine.jsonl"], [0]), ("c", ["core", "mine.jsonl"], [])):
        words = [word for probe in probes for word in ("--avoid", probe)]
        assert synth("--out", f"{name}.jsonl", "--number", "40", *words)[0] == 0
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert [number for number, quote in enumerate(said) if quote in text] == stays
    assert len(lines(tmp_path / "c.jsonl")) > 20


def test_a_base_model_writes_plain_text(synth, tiny_folder: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from retain.models.load import load_tokenizer

    copytree(tiny_folder, tmp_path / "base")
    tokenizer = load_tokenizer(str(tiny_folder))
    tokenizer.chat_template = None
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "base")
    assert synth("--model", "base", "--out", "old.jsonl", *SMALL)[0] == 0
    assert all(row.keys() == {"text"} and row["text"] for row in lines(tmp_path / "old.jsonl"))


def test_a_file_that_is_there_is_kept_unless_forced(synth, tmp_path: Path) -> None:
    out = tmp_path / "old.jsonl"
    out.write_text("mine\n")
    code, _, error = synth("--out", "old.jsonl", *SMALL)
    assert code == 2
    assert "exists already" in error
    assert "--force" in error
    assert out.read_text() == "mine\n"
    assert synth("--out", "old.jsonl", "--force", *SMALL)[0] == 0
    assert lines(out)


class Speaker:
    """Stands for `generate`: words that depend on the weights, the prompt and the draw; may fail at one call."""

    def __init__(
        self, fails_at: int = 0, failure: type[BaseException] = KeyboardInterrupt, quotes: Sequence[str] = ()
    ) -> None:
        self.fails_at, self.failure, self.quotes, self.draws = fails_at, failure, quotes, list[int]()

    def __call__(self, model, tokenizer, prompts, limit, temperature, top_p, draw):
        self.draws.append(draw)
        if len(self.draws) == self.fails_at:
            raise self.failure
        weight = next(model.parameters()).sum().item()
        said = []
        for prompt in prompts:
            digest = hashlib.sha256(f"{weight} {prompt} {draw}".encode()).digest()
            words = " ".join(WORDS[byte % len(WORDS)] for byte in digest[:5])
            words = self.quotes[digest[8] % 9] if digest[8] % 9 < len(self.quotes) else words
            said.append(Generated(f" {words}." if digest[9] % 2 else "", 6, True))  # half of them are dropped
        return said


def speak(monkeypatch: pytest.MonkeyPatch, **settings) -> list[int]:
    """Puts a `Speaker` in place; the draws that it is asked for."""
    speaker = Speaker(**settings)
    monkeypatch.setattr(generation, "generate", speaker)
    return speaker.draws


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_a_stop_half_way_loses_nothing(synth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure) -> None:
    """The file is not there until it is whole; the same command goes on, and ends with the same bytes."""
    in_many_calls(monkeypatch)
    words = ["--number", "60", "--seed", "7"]
    all_draws = speak(monkeypatch)
    assert synth("--out", "whole.jsonl", *words)[0] == 0
    assert len(lines(tmp_path / "whole.jsonl")) == 60
    first = speak(monkeypatch, fails_at=4, failure=failure)
    (tmp_path / "old.jsonl").write_text("mine\n")
    with pytest.raises(failure) if failure is MemoryError else contextlib.nullcontext():
        assert synth("--out", "old.jsonl", "--force", *words)[0] == 130
    assert (tmp_path / "old.jsonl").read_text() == "mine\n"
    unfinished = tmp_path / "old.jsonl.unfinished"
    with open(unfinished, "a") as file:  # and half a line, as a process that is killed leaves it
        file.write('{"time": 1, "call": "abc", "te')
    rest = speak(monkeypatch, fails_at=3, failure=failure)
    with pytest.raises(failure) if failure is MemoryError else contextlib.nullcontext():
        synth("--out", "old.jsonl", "--force", *words)
    last = speak(monkeypatch)
    code, said, _ = synth("--out", "old.jsonl", "--force", *words)
    assert code == 0
    assert "going on" in said
    assert first[:-1] + rest[:-1] + last == all_draws, "nothing is written twice, nothing is left out"
    assert (tmp_path / "old.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not unfinished.exists()


def test_another_model_does_not_go_on_with_what_is_there(synth, tmp_path: Path, monkeypatch) -> None:
    def train(seed: int) -> None:
        tiny_model(tiny_tokenizer(), seed=seed).save_pretrained(tmp_path / "mine")

    tiny_tokenizer().save_pretrained(tmp_path / "mine")
    train(1)
    speak(monkeypatch)
    assert synth("--model", "mine", "--out", "whole.jsonl")[0] == 0
    train(2)
    speak(monkeypatch, fails_at=4)
    assert synth("--model", "mine", "--out", "old.jsonl")[0] == 130
    train(1)  # same name, other weights
    speak(monkeypatch)
    assert synth("--model", "mine", "--out", "old.jsonl")[0] == 0
    assert (tmp_path / "old.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_nothing_usable_leaves_nothing(synth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "generate", lambda m, t, prompts, *rest: [Generated("", 1, True)] * len(prompts))
    code, _, error = synth("--out", "old.jsonl", *SMALL)
    assert code == 2
    assert "no usable row" in error
    assert not list(tmp_path.glob("old*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "old.txt"], ".jsonl"),
        (["--out", "folder.jsonl"], "is a folder"),
        (["--out", "old.jsonl", "--number", "0"], "--number"),
        (["--out", "old.jsonl", "--max-tokens", "0"], "--max-tokens"),
        (["--out", "old.jsonl", "--max-tokens", "5000"], "Allowed: 8 to 511"),
        (["--out", "old.jsonl", "--temperature", "0"], "--temperature"),
        (["--out", "old.jsonl", "--model", "no/such-model"], "no/such-model"),
        (["--out", "old.jsonl", "--avoid", "nowhere"], "nowhere: no such file"),
        ([], "--out"),
    ],
)
def test_bad_input_is_exit_2_and_leaves_nothing(synth, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    code, _, error = synth(*words)
    assert code == 2
    assert said in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.jsonl"]


@pytest.mark.slow
def test_a_run_replays_the_file(synth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert synth("--out", "old.jsonl", *SMALL)[0] == 0
    write_lines(tmp_path / "a.jsonl", response_rows(24))
    settings = ["probes.limit=2", "train.max_steps=2", "train.max_length=256", "methods=[{replay: {fraction: 0.5}}]"]
    words = ["run", "--task", "a.jsonl", "--output", "out", "-o", "old=old.jsonl"]
    words += [word for setting in settings for word in ("-o", setting)]
    monkeypatch.chdir(tmp_path)
    retain(monkeypatch, *words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["old"] == "rows given by the user: old.jsonl"
    assert results["training"][0]["replay_rows"] > 0
    assert not (tmp_path / "out" / "buffer" / "self.parquet").exists()
