"""`retain synth questions`, `retain probe` and `retain retention` on domain sets: with a scripted and a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from retain.cli import main
from retain.models import endpoint, generation
from retain.models.generation import Generated

REPLY = "Q: Which {a} is number {n}?\nA: thing {n}\n\n```\nnothing"
WORDS = [
    *("river", "stone", "music", "garden", "winter", "paper", "engine", "ocean"),
    *("candle", "forest", "bridge", "copper", "velvet", "harbour", "lantern"),
]
SMALL = ["--number", "6", "--each", "1", "--max-tokens", "64", "--seed", "3"]


@pytest.fixture
def retain(tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`retain(*words)` runs a command in an empty folder: (exit code, what it printed, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def start(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["retain", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return start


class Speaker:
    """Stands for `generate`: a new question for every request; may stop at one call."""

    def __init__(self, stops_at: int = 0) -> None:
        self.stops_at, self.calls = stops_at, 0

    def __call__(self, model, tokenizer, prompts, limit, temperature, top_p, draw):
        self.calls += 1
        if self.calls == self.stops_at:
            raise KeyboardInterrupt
        said = []
        for place, _ in enumerate(prompts):
            n = draw % 1000 * 8 + place
            said.append(Generated("" if n % 3 == 0 else REPLY.format(a=" ".join(WORDS[n % 15 :][:2]), n=n), 9, True))
        return said


def test_a_set_says_what_made_it_and_is_asked_at_once(retain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "generate", Speaker())
    code, said, error = retain("synth", "questions", "tools", "--out", "tools.json", *SMALL)
    assert code == 0, error
    content = json.loads((tmp_path / "tools.json").read_text())
    assert content["domain_name"] == "tools"
    assert len(content["questions"]) == len(content["ground_truths"]) == len(content["levels"]) == 6
    made = content["made"]
    assert (made["model"], made["seed"], made["each"], made["kept"]) == ("starter", 3, 1, 6)
    assert made["dropped"]["empty reply"] >= 2
    assert made["kept"] + sum(made["dropped"].values()) == made["tried"]
    assert f"6 of {made['tried']} questions kept (2 basic, 2 medium, 2 hard)" in said
    assert "empty reply" in said
    assert retain("synth", "questions", "tools", "--out", "rows.jsonl", *SMALL)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == content["questions"]
    assert [row.get("made") for row in rows] == [made, *[None] * 5]
    monkeypatch.undo()
    from retain.probes.suite import load_probes

    for name in ("tools.json", "rows.jsonl"):
        (probe,) = load_probes(tmp_path / name)
        assert [item.fields["prompt"] for item in probe.items] == content["questions"]


def test_a_stop_half_way_loses_nothing(retain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--number", "24", "--each", "1", "--max-tokens", "64"]
    monkeypatch.setattr(generation, "generate", whole := Speaker())
    assert retain("synth", "questions", "tools", "--out", "whole.json", *words)[0] == 0
    monkeypatch.setattr(generation, "generate", first := Speaker(stops_at=3))
    assert retain("synth", "questions", "tools", "--out", "part.json", *words)[0] == 130
    assert not (tmp_path / "part.json").exists()
    monkeypatch.setattr(generation, "generate", rest := Speaker())
    code, said, _ = retain("synth", "questions", "tools", "--out", "part.json", *words)
    assert code == 0
    assert "going on" in said
    assert first.calls - 1 + rest.calls == whole.calls
    assert (tmp_path / "part.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_endpoint_writes_too_and_material_is_shown(retain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict]] = []

    def post(self, url, body):
        asked.append((url, body))
        n = len(asked)
        text = json.dumps([{"question": f"Which {WORDS[n % 15]} is number {n}?", "answer": f"thing {n}"}])
        return {"choices": [{"message": {"content": f"```json\n{text}"}, "finish_reason": "stop"}]}

    monkeypatch.setattr(endpoint.Endpoint, "_post", post)
    (tmp_path / "text.txt").write_text("Gold is soft.\n\nIron is hard.\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is tin?", "response": "A metal."}\n')
    words = ["--endpoint", "http://127.0.0.1:9/v1", "-m", "big", "--material", "text.txt", "--material", "rows.jsonl"]
    code, said, error = retain("synth", "questions", "metals", "--out", "metals.json", *words, *SMALL)
    assert code == 0, error
    assert "6 of 6 questions kept" in said
    assert {url for url, _ in asked} == {"http://127.0.0.1:9/v1/chat/completions"}
    assert {body["model"] for _, body in asked} == {"big"}
    shown = "\n".join(body["messages"][0]["content"] for _, body in asked)
    assert all(text in shown for text in ("Gold is soft.", "Iron is hard.", "What is tin?\nA metal."))
    made = json.loads((tmp_path / "metals.json").read_text())["made"]
    assert (made["model"], made["endpoint"]) == ("big", "http://127.0.0.1:9/v1")
    assert made["repaired"] == {"code fence": 6}
    assert made["material"] == ["text.txt", "rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.csv"], "ends in .json or .jsonl"),
        (["--out", "x.json", "--max-tokens", "5000"], "Allowed: 32 to 511"),
        (["--out", "x.json", "--endpoint", "http://127.0.0.1:9/v1"], "--model: missing"),
        (["--out", "x.json", "--endpoint", "nowhere", "-m", "big"], "endpoint.url"),
        (["--out", "x.json", "--material", "no.txt"], "no.txt"),
        ([], "--out"),
    ],
)
def test_bad_input_is_exit_2_and_leaves_nothing(retain, tmp_path: Path, words: list[str], said: str) -> None:
    code, _, error = retain("synth", "questions", "tools", *words)
    assert code == 2
    assert said in error
    assert not list(tmp_path.iterdir())


def test_what_belongs_to_the_questions_is_refused_in_front_of_them(retain) -> None:
    code, _, error = retain("synth", "--out", "x.jsonl", "questions", "tools", "--out", "y.json")
    assert code == 2
    assert "give it behind 'questions'" in error


@pytest.fixture
def domains(retain, tmp_path: Path) -> Path:
    """Two domains of which the tiny model knows some: what it says itself is right for two questions in three."""
    from retain.models.load import load_model
    from retain.probes.asking import ask
    from retain.probes.base import Subject
    from retain.probes.suite import probes_from_rows

    model, tokenizer = load_model("starter")
    folder = tmp_path / "domains"
    folder.mkdir()
    for name in ("history", "biology"):
        questions = [f"What is the {word} of {name}?" for word in WORDS[:9]]
        probe = probes_from_rows([{"prompt": q, "answers": ["x"]} for q in questions], name)
        said = [row["output"] for row in ask(probe, Subject(model, tokenizer))]
        truths = [text if n % 3 and text.strip() else "elephant" for n, text in enumerate(said)]
        content = {"domain_name": name, "questions": questions, "ground_truths": truths}
        (folder / f"{name}.json").write_text(json.dumps(content))
    tiny_model(tiny_tokenizer(), seed=1).save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    return folder


def test_probe_prints_a_line_per_domain_and_one_for_all(retain, domains: Path) -> None:
    code, said, error = retain("probe", "starter", "-p", "domains")
    assert code == 0, error
    lines = {line.split("│")[1].strip(): line for line in said.splitlines() if line.startswith("│")}
    assert {"biology", "history", "all questions"} <= lines.keys()
    assert " 18 " in lines["all questions"]
    code, said, _ = retain("probe", "starter", "-p", "domains/history.json", "--limit", "4")
    assert code == 0
    assert "all questions" not in said


def test_retention_of_a_tuned_model(retain, domains: Path, tmp_path: Path) -> None:
    outputs = [word for ending in ("json", "md", "html") for word in ("--output", f"out/report.{ending}")]
    code, said, error = retain("retention", "starter", "tuned", "-p", "domains", *outputs)
    assert code == 0, error
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [kept["info"]["name"] for kept in report["domains"]] == ["biology", "history"]
    every = report["every"]["change"]
    for name in ("items", "lost", "gained", "kept"):
        assert every[name] == sum(kept["change"][name] for kept in report["domains"])
    assert every["before"]["value"] > every["after"]["value"], "other weights know less"
    assert every["retention"] == pytest.approx(100 * every["after"]["value"] / every["before"]["value"])
    assert every["band"] in said
    flips = report["flips"]
    assert sum(flip["outcome"] == "lost" for flip in flips) == every["lost"] > 0
    for ending in ("md", "html"):
        text = (tmp_path / "out" / f"report.{ending}").read_text()
        assert flips[0]["question"] in text
        assert "biology" in text


def test_a_model_retains_all_of_itself(retain, domains: Path, tmp_path: Path) -> None:
    assert retain("retention", "starter", "starter", "-p", "domains", "--output", "r.json")[0] == 0
    report = json.loads((tmp_path / "r.json").read_text())
    for kept in [*report["domains"], report["every"]]:
        assert kept["retention"]["value"] == pytest.approx(100)
        assert (kept["change"]["band"], kept["change"]["lost"]) == ("excellent", 0)
        assert kept["retention"]["low"] < 99, "a few questions do not exclude a loss"
    assert report["flips"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "nowhere"], "nowhere: no such file"),
        (["-p", "core", "-p", "core"], "two probes are called"),
        (["-p", "core", "--output", "x.txt"], "ends in .md, .html, .json"),
        ([], "--probes"),
    ],
)
def test_mistakes_of_retention_are_exit_2(retain, words: list[str], said: str) -> None:
    code, _, error = retain("retention", "starter", "starter", *words)
    assert code == 2
    assert said in error


def test_the_interval_of_retention_covers_the_truth() -> None:
    """Of 100 draws of 120 questions with a known share lost, about 95 intervals hold the true retention."""
    from retain.functional.verdict_intervals import Scores, retention_interval

    random, held, draws = np.random.default_rng(0), 0, 100
    for _ in range(draws):
        before = random.random(120) < 0.6
        after = np.where(before, random.random(120) < 0.75, random.random(120) < 0.1)
        value = 100 * min(1, after.mean() / before.mean())
        found = retention_interval(Scores(before * 1.0, after * 1.0, None, "higher", True), value)
        held += found.low <= 100 * (0.6 * 0.75 + 0.4 * 0.1) / 0.6 <= found.high
    assert 0.90 <= held / draws <= 0.99
