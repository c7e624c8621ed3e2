"""Makes `tiny` and `training_kit` importable and gives the tiny tokenizer and model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny.tiny_model(tokenizer)
