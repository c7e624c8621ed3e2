"""One library of experts on the tiny model, and what each of them says alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from expert_kit import library
from serving_kit import Alone

from retain.experts.library import ExpertLibrary


@pytest.fixture(scope="session")
def shelf(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExpertLibrary:
    """Three experts; for tests that do not change the library."""
    return library(tiny_folder, tmp_path_factory.mktemp("shelf") / "experts")


@pytest.fixture(scope="session")
def alone(tiny_folder: Path, shelf: ExpertLibrary) -> Alone:
    """What an expert of the shelf says when nobody else is asked."""
    return Alone(tiny_folder, shelf)
