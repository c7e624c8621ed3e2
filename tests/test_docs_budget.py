"""docs/budget.md: its table is what the package computes, and its pictures are pictures."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from retain.functional.budget import items_needed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_budget", ROOT / "docs" / "make_budget.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_fresh(maker):
    text = maker.PAGE.read_text(encoding="utf-8")
    assert maker.put(text, "items", maker.table()) == text, "run `python docs/make_budget.py`"


def test_the_table_says_what_a_count_of_none_can_show(maker):
    """Exact for none of n: 1 − 0.05^(1/n) is at most one point from 299 on."""
    (row,) = (line for line in maker.table().splitlines() if line.startswith("| 1 point "))
    cells = [int(cell.replace(",", "")) for cell in re.findall(r"[\d,]+(?= \|)", row)]
    assert cells[0] == items_needed(0.01) == pytest.approx(299, rel=0.05)
    assert cells == sorted(cells)


def test_the_run_is_on_the_page_with_its_pictures(maker):
    text = maker.PAGE.read_text(encoding="utf-8")
    made = text.split("<!-- run: made")[1].split("<!-- end -->")[0]
    for name in re.findall(r"\((\w+\.svg)\)", made):
        ElementTree.parse(ROOT / "docs" / name)
    assert made.count(".svg)") == 2
    assert "| Share of the way |" in made


def test_a_page_without_marks_is_refused(maker):
    with pytest.raises(ValueError, match="no marks"):
        maker.put("nothing", "items", "table")
