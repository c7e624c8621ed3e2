"""docs/probes.md: its rows load, every kind has one, and its tables say what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from retain.probes.answer import SCORES
from retain.probes.instruction import CHECKS
from retain.probes.suite import kinds, probes_from_rows

TEXT = (Path(__file__).parents[1] / "docs" / "probes.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^### |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def test_every_kind_has_a_section():
    assert set(SECTIONS) == set(kinds())


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_rows_load_as_their_kind(kind):
    rows = [json.loads(line) for block in re.findall(r"```json\n(.*?)```", SECTIONS[kind], re.DOTALL)
            for line in block.splitlines()]  # fmt: skip
    assert rows
    assert {probe.kind for probe in probes_from_rows(rows, kind)} == {kind}


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_fields_and_options_of_the_table(kind):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{kind}` |"))
    fields, options = (set(re.findall(r"`(\w+)`", cell)) for cell in row.split("|")[2:4])
    cls = kinds()[kind]
    assert (fields, options) == (set(cls.fields), set(cls.settings))
    if limit := re.search(r"`max_tokens` \((\d+)\)", row):
        assert int(limit[1]) == (cls._DEFAULTS["max_tokens"] if kind == "divergence" else cls.max_tokens)


def test_scores_and_checks_are_listed():
    assert set(re.findall(r"^\| `(\w+)`", SECTIONS["answer"], re.MULTILINE)) == {"score", *SCORES}
    assert set(re.findall(r"`(\w+)`", SECTIONS["instruction"])) >= set(CHECKS)
