"""What the tests of advice share: files of two kinds of rows, and a model that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from advice_kit import counting, travelling
from run_kit import write_lines

from retain.advice.reading import Reader


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of both kinds, old rows, and no two rows alike."""
    folder = tmp_path_factory.mktemp("desk")
    write_lines(folder / "counting.jsonl", counting(40))
    write_lines(folder / "more_counting.jsonl", counting(30, 1000))
    write_lines(folder / "travelling.jsonl", travelling(40))
    write_lines(folder / "old.jsonl", travelling(24, 500))
    return folder


@pytest.fixture
def reader(model, tokenizer) -> Reader:
    """The tiny model."""
    return Reader(model, tokenizer)
