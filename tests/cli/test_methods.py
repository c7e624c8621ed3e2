"""`retain methods`: the table tells what each method costs, in time and in memory."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from retain.cli import _commands, app
from retain.cli.methods import part
from retain.methods import summaries

#: What takes most of the time, and what of the memory.
DOMINATING = {
    "agem": ("forward and backward pass", "gradient in memory"),
    "distill": ("forward pass", "copy of the trainable weights"),
    "mtt": ("forward pass", "copy of the trainable weights"),
    "ilora": ("forward pass", "copy of the trainable weights"),
    "ewc": ("forward and backward pass", "two copies"),
    "mas": ("forward and backward pass", "two copies"),
    "si": ("per step", "five copies"),
    "sdft": ("an answer is written", "copy of the trainable weights"),
    "subspace": ("SVD", "copy of the trained matrices"),
}


@pytest.mark.parametrize("name", DOMINATING)
def test_a_cost_names_time_and_memory_time_first(name: str) -> None:
    said = part(summaries()[name]["doc"], "Cost")
    first, second = (said.find(words) for words in DOMINATING[name])
    assert 0 <= first < second, said


def test_a_part_is_its_whole_first_sentence() -> None:
    doc = "Needs: nothing; 1.2 MB.\nCost: one pass; a copy\n    of it. More.\nCombine with: all.   Conflicts: none."
    assert part(doc, "Needs") == "nothing; 1.2 MB"
    assert part(doc, "Cost") == "one pass; a copy of it"
    assert part(doc, "Conflicts") == ""
    assert part(doc, "Tune") == ""


@pytest.mark.parametrize("width", ["80", "120"])
def test_the_table_has_all_of_it_at_every_width(width: str) -> None:
    _commands()
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": width}).output
    lines = shown.splitlines()
    assert max(map(len, lines)) <= int(width)
    begin = lines[next(i for i, line in enumerate(lines) if " cost " in line)].index(" cost ") + 1
    row = next(i for i, line in enumerate(lines) if line.startswith("agem "))
    cells = []
    for line in lines[row:]:
        if cells and line[:1].strip():
            break
        cells.append(re.split(r"\s{2,}", line[begin:])[0].strip())
    assert " ".join(cells).split() == part(summaries()["agem"]["doc"], "Cost").split()
