"""Numbers of other libraries against ours, in its quick form; the page names the same numbers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
PATH = Path(__file__).parents[1] / "bench" / "parity.py"


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(parity):
    return parity.rows(resamples=2000)


def test_every_number_is_equal(found):
    assert not [row for row in found if not row.equal]
    assert len({row.other for row in found}) >= 7


def test_the_page_is_fresh(parity, found):
    """Names of its rows; numbers may differ in the last digit on another processor."""
    lines = [
        line.split(" | ") for line in parity.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    assert [line[0].removeprefix("| ") for line in lines[1:]] == [row.name for row in found]
    assert all(line[-1].startswith("yes") for line in lines[1:])


@pytest.mark.parametrize(
    ("theirs", "ours", "error", "equal"),
    [(0.25, 0.25, 0, True), (0.25, 0.2501, 0, False), (2752052517.4, 2752049669.7, 0, True), (1e3, 1001, 0, False),
     (0.5, 0.52, 0.03, True), (0.5, 0.54, 0.03, False), (0.0, 0.0, 0, True), (0.0, 0.001, 0, False)],
)  # fmt: skip
def test_equal_means_the_last_digit_shown(parity, theirs, ours, error, equal):
    assert parity.Row("", "", theirs, ours, error).equal is equal


def test_a_wrong_number_is_found(parity, monkeypatch):
    from retain.functional import statistics

    right = statistics.holm
    monkeypatch.setattr(statistics, "holm", lambda p: [min(1, value * len(p)) for value in p])  # Bonferroni's
    assert [row for row in parity.intervals() if not row.equal]
    monkeypatch.setattr(statistics, "holm", right)
    assert all(row.equal for row in parity.intervals())
