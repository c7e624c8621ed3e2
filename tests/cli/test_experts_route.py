"""`retain experts route` on a tiny model: the choice, its reason, JSON, and one line per mistake."""

from __future__ import annotations

import json
from pathlib import Path

import expert_kit
import pytest
from routing_kit import EXAMPLES, NEW
from typed import speaking


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    found = expert_kit.ExpertLibrary(folder / "experts")
    made = expert_kit.adapter(tiny_folder, folder / "adapter", 2, ["q_proj"])
    for name, examples in EXAMPLES.items():
        found.add(name, made, examples=examples)
    (folder / "others.txt").write_text(
        "How are you?\nTell me a joke.\n你好\nWrite a letter to my aunt.\n", encoding="utf-8"
    )
    return folder


@pytest.fixture
def route(shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`route(*words)`: what it printed; with `refused` the one line of the error."""
    monkeypatch.chdir(shelf)

    return speaking(monkeypatch, capsys, "experts", "route")


def test_the_expert_and_how_sure(route) -> None:
    name, sure = route(NEW["poems"][0], "--router", "keyword").split()
    assert name == "poems"
    assert 50 < int(sure.rstrip("%")) <= 100
    assert route("Suggest a name for my cat", "-r", "keyword").startswith("base  ")


def test_why_shows_the_reason_and_every_expert(route) -> None:
    first, reason, *chances, time = route(NEW["medicine"][0], "--why").splitlines()
    assert first.startswith("medicine  ")
    assert reason.startswith("medicine: “")
    assert "its nearest question is “" in reason
    listed = [line.split()[1] for line in chances]
    assert listed[0] == "medicine"
    assert set(listed) == set(EXAMPLES)
    assert time.endswith(" ms")


def test_json_is_the_choice(route) -> None:
    found = json.loads(route(NEW["sums"][0], "--json", "-r", "keyword"))
    assert found["expert"] == "sums"
    assert found["confidence"] == found["scores"]["sums"]
    assert set(found) == {"expert", "confidence", "scores", "why", "seconds"}


def test_without_a_question_it_is_fitted(route, shelf: Path) -> None:
    said = route("-r", "gate", "--others", "others.txt")
    assert said.startswith("gate: ")
    assert "% of held-out questions right; knows medicine, poems, sums" in said
    saved = json.loads((shelf / "experts" / ".routers" / "gate" / "router.json").read_text(encoding="utf-8"))
    assert "你好" in saved["examples"]
    assert len(saved["examples"]) == 4 + sum(map(len, EXAMPLES.values()))


def test_mistakes_are_one_line(route) -> None:
    assert "Did you mean 'keyword'" in route("x", "-r", "keywords", refused=True)
    assert "does not use one" in route("x", "-r", "gate", "--embedding", "e", refused=True)
    assert "nowhere.txt" in route("x", "--others", "nowhere.txt", refused=True)
    assert "no expert with 2 or more questions" in route("x", "--library", "empty", refused=True)
