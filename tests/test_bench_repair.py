"""The bench of repairs: what it asks, and the page that it writes; nothing is trained here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from run_kit import write_lines

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import repair  # noqa: E402

from retain.probes.suite import load_probes  # noqa: E402


@pytest.fixture
def data(tmp_path: Path) -> Path:
    names = [(task, i) for task in ("gcd", "lcm") for i in range(9)]
    puzzles = [{"task": task, "prompt": f"{task} {i}?", "response": f"{i}"} for task, i in names]
    write_lines(tmp_path / "reasoning_gym" / "test.jsonl", [*puzzles, puzzles[3]])
    facts = [
        {"relation": relation, "prompt": prompt, "response": f"R{i}"}
        for i in range(30)
        for relation, prompt in (
            ("capital", f"The capital of L{i} is"),
            ("continent", f"L{i} is a country in the continent of"),
            ("currency", f"The currency of L{i} is"),
        )
    ]
    write_lines(tmp_path / "facts_countries" / "test.jsonl", facts)
    return tmp_path


def test_each_row_of_the_learned_families_is_asked_once(data, tmp_path):
    path = repair.questions("full", data, tmp_path / "work", 40)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == [f"gcd {i}?" for i in range(9)], "lcm is none that is learned"
    assert rows[2] == {"kind": "answer", "prompt": "gcd 2?", "answers": ["2"], "score": "exact"}


def test_questions_to_keep_are_of_both_halves_of_the_other_bench(data, tmp_path):
    named = repair.kept(data, tmp_path / "work", 25)
    assert named[:2] == ["core/elements", "core/instructions"]
    probes = [probe for source in named[2:] for probe in load_probes(source)]
    assert {probe.name: len(probe.items) for probe in probes} == {"capitals": 25, "continents": 25, "sums": 25}


def test_the_page_in_the_docs_is_what_the_results_say(tmp_path):
    written = repair.PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "repair.md"
    copy.write_text(written.replace("| tuned |", "| changed |"), encoding="utf-8")
    repair.fill(copy, repair.RESULTS)
    assert copy.read_text(encoding="utf-8") == written
    assert written.count("(chosen)") == len(repair.STUDIES), "each was measured"
