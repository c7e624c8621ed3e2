"""The bench of pilots: what it compares, and the page that it writes; nothing is trained here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import pilot  # noqa: E402
from two_tasks_runs import OutOfTime  # noqa: E402

from retain import methods  # noqa: E402


def result(learned: int, lost: int) -> dict:
    """48 items of each family: the first are right or wrong."""
    before = {"A": "1" * 48, "B": "0" * 48, "C": "0" * 48}
    right = "1" * learned + "0" * (48 - learned)
    after = {"A": "0" * lost + "1" * (48 - lost), "B": right, "C": right}
    return {"answers": [before, after, after], "seconds": 4.0, "asked": False}


class Known:
    """Recipes are better the later they stand in the list; a quarter of the steps learns a quarter."""

    def get(self, name, setting, seed):
        place = [n.replace(" ", "-") for n in pilot.RECIPES].index(name)
        found = result(round((16 + 2 * place) * setting["share"]), 4)
        return found | {"seconds": 4.0 * setting["share"]}


def test_balance_is_that_of_the_verdict():
    assert pilot.balance(result(24, 12), 48) == pytest.approx(0.6 * (1 - (12 / 48 + 0) / 2) + 0.4 * 0.5)
    assert pilot.balance(result(24, 12), 12) == pytest.approx(0.6 * 0.5 + 0.4), "the first twelve alone"


def test_agreement_of_an_order_with_itself_and_with_its_reverse():
    full = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.5]])
    same, other = pilot.agreement(full, full), pilot.agreement(-full, full)
    assert same["spearman"] == same["kendall"] == [1, 1, 1]
    assert (same["first"], same["lost"]) == ("2 of 2", [0, 0, 0])
    assert other["spearman"][0] == other["kendall"][0] == -1
    assert other["lost"][0] == pytest.approx(100 * (0.3 + 0.4) / 2)


def test_every_recipe_can_be_built():
    for entries in pilot.RECIPES.values():
        assert methods.build(entries)


def test_the_table_comes_from_the_runs_and_goes_between_the_marks(tmp_path, monkeypatch):
    page, results = tmp_path / "advise.md", tmp_path / "pilot.json"
    page.write_text(f"before\n{pilot.BEGIN}\nold\n{pilot.END}\nafter\n")
    monkeypatch.setattr(pilot, "Store", lambda *a: Known())
    words = ["--seeds", "0", "1", "--page", str(page), "--results", str(results), "--out", str(tmp_path / "out")]
    assert pilot.main(words) == 0
    found = json.loads(results.read_text())
    assert found["pilots"][0]["cost"] == pytest.approx(0.25)
    assert [p["items"] for p in found["pilots"]] == [items for _, items in pilot.PILOTS]
    assert found["another seed"]["spearman"] == [1, 1, 1]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| lora + replay + distill |" in text


def test_a_spent_budget_leaves_the_page(tmp_path, monkeypatch):
    class Spent:
        def get(self, *words):
            raise OutOfTime

    monkeypatch.setattr(pilot, "Store", lambda *a: Spent())
    assert pilot.main(["--page", str(tmp_path / "none.md"), "--out", str(tmp_path)]) == 3
