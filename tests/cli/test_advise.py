"""`retain advise`: flags, questions, what is written, and the gate for incoming rows."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from advice_kit import counting, invented, travelling
from run_kit import write_lines
from typed import speaking, typed

from retain.config import read
from retain.pipeline import plan


@pytest.fixture
def folder(tmp_path, thin_suites, tiny_cache, monkeypatch):
    """An empty folder with rows; nobody can be asked."""
    write_lines(tmp_path / "new.jsonl", counting(30))
    write_lines(tmp_path / "other.jsonl", travelling(30))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


@pytest.fixture
def advise(folder, monkeypatch, capsys):
    return speaking(monkeypatch, capsys, "advise")


QUICK = ("--data", "new.jsonl", "--memory", "8", "--similarity", "0.6", "--no-trial")


def test_flags_give_a_file_and_say_what_was_not_asked(advise, folder):
    shown = advise(*QUICK, "--lose-at-most", "0.2")  # of the thin suites no less can be sure
    config = read(folder / "advice.yaml")
    assert plan(config)
    assert config.budget.lose_at_most == 0.2
    for part in ("Not asked", "model starter", "old none", "private no", "replay.fraction", "Written: advice.yaml"):
        assert part in shown
    assert "lose at most" not in shown.split("Written")[0].split("taken:")[1].split(".")[0], "it was given"
    before = (folder / "advice.yaml").read_text()
    assert "not written over" in advise(*QUICK, refused=True)
    assert (folder / "advice.yaml").read_text() == before
    advise(*QUICK, "--private", "--force")
    assert read(folder / "advice.yaml").private


def test_it_asks_at_a_terminal_for_what_was_not_given(advise, folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    answers = iter(["new.jsonl", "starter", "8", "none", "y", "1", "adapters", "0"])
    asked: list[str] = []

    def answer(self, prompt="", **kwargs):
        asked.append(str(prompt))
        return next(answers)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("rich.console.Console.input", answer)
    shown = advise("--similarity", "0.6", "--no-trial", "--output", "asked.yaml")
    assert len(asked) == 8
    assert "Not asked" not in shown
    values = yaml.safe_load((folder / "asked.yaml").read_text())
    assert values["private"] is True
    assert values["methods"][1]["der"]["own"] == 32, "a task comes after this one"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to learn"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        ((*QUICK, "--serve", "merge"), "Did you mean 'merged'"),
        ((*QUICK, "--rows", "3"), "--rows: belongs to --incoming or --refresh"),
        (("--incoming", "new.jsonl"), "Give --seen"),
        (("--incoming", "new.jsonl", "--refresh", "new.jsonl"), "two questions"),
        (("--incoming", "new.jsonl", "--data", "x"), "--data: has no effect with --incoming"),
        (("--refresh", "new.jsonl"), "--rows is missing"),
        (("--refresh", "new.jsonl", "--rows", "3", "--output", "new.jsonl"), "not written over"),
        (("--refresh", "new.jsonl", "--rows", "3", "--output", "a.jsonl", "--json"), "--json: has no effect"),
        (("--incoming", "new.jsonl", "--seen", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(words, said, advise):
    assert said in advise(*words, refused=True)


def test_incoming_rows_are_a_gate(folder, monkeypatch, capsys):
    ask = ("advise", "--incoming", "other.jsonl", "--seen", "new.jsonl")
    assert typed(monkeypatch, *ask) == 1
    assert "new kind: accept with more replay" in capsys.readouterr().out
    assert typed(monkeypatch, *ask, "--json", "--output", "drift.json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "drift.json").read_text())
    assert (found["kind"], found["accepted"]) == ("new kind", False)


def test_rows_of_the_same_kind_pass(folder, monkeypatch, capsys):
    rows = invented(300)
    half, rest = (write_lines(folder / f"{i}.jsonl", rows[i::2]) for i in (0, 1))
    assert typed(monkeypatch, "advise", "--incoming", half, "--seen", rest) == 0
    assert "same kind: accept" in capsys.readouterr().out


def test_a_fresh_mix_is_written(advise, folder):
    write_lines(folder / "general.jsonl", invented(30))
    shown = advise("--refresh", "general.jsonl", "--rows", "3", "--seen", "new.jsonl", "--output", "fresh.jsonl")
    assert "3 fresh rows of 30" in shown
    assert len((folder / "fresh.jsonl").read_text().splitlines()) == 3


def test_the_gate_of_the_page_runs(folder, monkeypatch, capsys):
    """Its blocks for `bash` end well and are run with all others; this one says no."""
    page = (Path(__file__).parents[2] / "docs" / "advise.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, rows in {"legal": travelling(20), "medical": counting(20), "yours": invented(20)}.items():
        write_lines(folder / "data" / f"{name}.jsonl", rows)
    assert typed(monkeypatch, *shlex.split(block)[1:]) == 1
    assert "new kind" in capsys.readouterr().out
