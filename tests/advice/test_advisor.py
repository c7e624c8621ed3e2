"""From files and a model to a configuration: what is measured, what is written, what a pilot does to the order."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from advice_kit import counting
from run_kit import write_lines

from retain.advice import Request, advise, pilot
from retain.advice.advisor import write
from retain.advice.facts import ASSUMED
from retain.advice.trial import peak, tried
from retain.config import parse, read
from retain.errors import ConfigError, RetainError
from retain.pipeline import plan, run

ALLOWED = 64 * 2**20


@pytest.fixture(scope="module")
def asked(desk, tiny_folder, tmp_path_factory) -> Request:
    """A request on the tiny model."""
    place = tmp_path_factory.mktemp("advised") / "run"
    return Request([str(desk / "counting.jsonl")], model=str(tiny_folder), memory=8.0, output=str(place), price=2.0)


@pytest.fixture(scope="module")
def advice(asked, desk):
    """What comes of it with old rows and nothing measured: no recipe has rows to write first."""
    return advise(replace(asked, old=str(desk / "old.jsonl"), similarity=0.6, trial=False), say=lambda line: None)


def test_a_configuration_is_written_that_a_run_takes(advice, tmp_path):
    path = tmp_path / "advice.yaml"
    write(advice.text(), path)
    config = read(path)
    assert config == parse(advice.values)
    assert plan(config).stages == ["00-base", "01-counting"]
    text = path.read_text(encoding="utf-8")
    for choice in advice.choices:
        assert choice.setting.rpartition(".")[2] in text
    for word in ("similarity 0.6: as given", "expected memory", "expected time", "expected cost"):
        assert word in text.replace("\n# ", " ")
    with pytest.raises(ConfigError, match="not written over"):
        write("other", path)
    assert path.read_text(encoding="utf-8") == text
    write("other", path, again=True)
    assert path.read_text(encoding="utf-8") == "other"


def test_rows_are_counted_and_their_length_is_kept(advice):
    assert advice.scenario.rows == 36, "a tenth is held out"
    assert advice.values["train"]["max_length"] == max(64, -(-advice.scenario.longest // 32) * 32)
    assert advice.scenario.parameters < 1e6


def test_what_can_be_measured_is(asked, desk, thin_suites):
    found = advise(replace(asked, old=str(desk / "old.jsonl")), say=lambda line: None)
    assert found.similarity.general_rows == 24
    assert found.scenario.similarity == found.similarity.value
    assert found.trial.seconds > 0
    assert any("the most that a real step held" in note for note in found.notes)
    assert found.values["old"] == str(desk / "old.jsonl")
    assert found.ranking[0] == "ewc and replay"


def test_private_rows_stay_private(asked, desk, thin_suites):
    found = advise(replace(asked, private=True, old=str(desk / "old.jsonl"), similarity=0.6, trial=False), print)
    assert found.values["private"] is True
    assert "old" not in found.values
    assert plan(found.config()).config.private


def test_weights_that_are_too_large_are_not_read(asked, thin_suites, monkeypatch):
    monkeypatch.setattr("retain.advice.facts.MEASURABLE", {"cpu": 10})
    monkeypatch.setattr("retain.models.load.load_model", lambda *a, **k: pytest.fail("read"))
    found = advise(asked, say=lambda line: None)
    assert found.scenario.similarity == ASSUMED
    assert any("assumed" in note for note in found.notes)
    assert any("(estimated)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": []}, "nothing to learn"),
        ({"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"old": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"memory": -1.0}, "memory is -1"),
        ({"similarity": 7.0}, "similarity is 7"),
    ],
)
def test_bad_input_is_a_line(asked, changes, said):
    with pytest.raises(RetainError) as error:
        advise(replace(asked, **({"similarity": 0.5, "trial": False} | changes)), say=lambda line: None)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_peak_is_of_what_is_held_meanwhile():
    before = torch.zeros(ALLOWED // 4)
    with peak("cpu") as small:
        pass
    with peak("cpu") as large:
        held = torch.ones(ALLOWED)  # four bytes each
        del held
    assert ALLOWED * 3 < large.bytes - small.bytes < ALLOWED * 5
    assert len(before)


def test_a_trial_leaves_nothing_and_takes_the_longest_rows(advice, model, tokenizer, desk, tmp_path, monkeypatch):
    from retain.data.tasks import load_task

    monkeypatch.chdir(tmp_path)
    config = advice.config()
    found = tried(config, dict(plan(config).train), model, tokenizer, load_task(desk / "counting.jsonl").rows)
    assert list(tmp_path.iterdir()) == []
    assert found.device == "cpu"
    assert found.rows == 8
    assert 0 < found.width <= config.train["max_length"]


@pytest.mark.slow
def test_a_pilot_orders_recipes_and_goes_on(advice, tmp_path, thin_suites, monkeypatch):
    said: list[str] = []
    found = pilot(advice, tmp_path, steps=2, items=2, test_rows=4, say=said.append)
    assert [line.balance for line in found.lines] == sorted((line.balance for line in found.lines), reverse=True)
    assert {line.recipe for line in found.lines} == set(advice.ranking)
    assert len(found.lines) == 3
    bases = {(tmp_path / name.replace(" ", "-") / "probes" / "00-base.parquet").read_bytes() for name in advice.ranking}
    assert len(bases) == 1, "the base was asked once"
    kept = json.loads((tmp_path / "pilot.json").read_text())
    assert [line["recipe"] for line in kept["order"]] == [line.recipe for line in found.lines]

    monkeypatch.setattr("retain.training.trainer.ContinualTrainer.train", lambda *a, **k: pytest.fail("trained again"))
    assert [one.recipe for one in pilot(advice, tmp_path, 2, 2, 4, said.append).lines] == [
        line.recipe for line in found.lines
    ]
    winner = advice.with_recipe(found.lines[-1].recipe)
    text = winner.text(found.paragraphs())
    assert yaml.safe_load(text)["methods"] == winner.values["methods"]
    assert "Pilot of 2 steps" in text
    with pytest.raises(RetainError, match="other `"):
        pilot(advice, tmp_path, 3, 2, 4, said.append)


def test_the_advised_configuration_runs(advice, thin_suites):
    values = advice.with_recipe("frozen layers").values
    values["train"] |= {"max_steps": 2, "save_strategy": "no"}
    values["probes"] = {"limit": 2, "task_limit": 2}
    assert run(parse(values), lambda line: None).finished


def test_several_tasks_are_read_together(asked, tmp_path, thin_suites):
    more = write_lines(tmp_path / "more.jsonl", counting(20, 77))
    found = advise(replace(asked, data=[*asked.data, str(more)], similarity=0.6, later=2, trial=False), print)
    assert found.scenario.tasks == 4
    assert found.scenario.rows == 18
    assert [task["data"] for task in found.values["tasks"]] == [*asked.data, str(more)]
