"""Models that are set against each other are asked in one arithmetic: that of the run among them."""

from __future__ import annotations

import pytest
import yaml

from retain import measuring
from retain.models import params


@pytest.fixture
def run(tmp_path):
    """Makes a run directory of these settings; nothing is trained."""

    def make(**settings: object) -> str:
        place = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        (place / "run.yaml").write_text(yaml.safe_dump({"tasks": ["new.jsonl"], "model": "starter"} | settings))
        return str(place)

    return make


@pytest.mark.parametrize("machine", [True, False])
def test_a_run_is_asked_as_it_asked_itself(run, monkeypatch, machine):
    monkeypatch.setattr(params, "computes_bf16", lambda device: machine)
    assert measuring.asked_in_half(["starter", "some/model"]) is machine
    assert measuring.asked_in_half([run()]) is machine
    assert measuring.asked_in_half([run(train={"bf16": False})]) is False
    assert measuring.asked_in_half([run(train={"bf16": True})]) is True
    assert measuring.asked_in_half([run(train={"fp16": True})]) is False
    given = {"probes": {"precision": "bfloat16"}, "train": {"bf16": False}}
    assert measuring.asked_in_half(["starter", run(**given), run(train={"bf16": False})]) is True
    assert measuring.asked_in_half([run(probes={"precision": "float32"})]) is False


def test_the_arithmetic_is_the_one_that_was_asked_for(monkeypatch):
    import torch

    from retain.probes import asking

    seen: list[bool] = []
    monkeypatch.setattr(asking, "ask", lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or [])
    monkeypatch.setattr(measuring, "_device", lambda: "cpu")
    for half in (True, False):
        measuring.answers(torch.nn.Linear(1, 1), None, [], half=half)
    assert seen == [True, False]
