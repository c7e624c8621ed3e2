"""The fixture that writes run directories for the report tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import build_run


@pytest.fixture
def make_run(tmp_path):
    """`make_run("name", tasks=…, drop=…)` writes a run directory and returns its path."""

    def make(name: str = "careful", **options) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        build_run(directory, **options)
        return directory

    return make
