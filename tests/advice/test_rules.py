"""Scenarios and what is advised in them: the tables of the specification, line by line."""

from __future__ import annotations

import pytest
import yaml

from retain.advice import recipes, rules
from retain.advice.scenario import Scenario
from retain.advice.writing import document
from retain.config import parse
from retain.errors import ConfigError
from retain.methods.lora import PRESETS
from retain.pipeline import plan

#: What is said of a scenario → settings that must come out; a value None: the method is not there.
SCENARIOS = {
    "one task, no old rows, small model": (
        Scenario(135e6, 0.65, memory=8),
        {"recipe": "own rows", "replay.source": "self", "replay.fraction": 0.3, "distill.strength": 2.0, "lora.r": 16,
         "interpolate.strength": 0.1, "train.learning_rate": 1e-3, "model.quantize": "none", "freeze": None},
    ),
    "old rows": (
        Scenario(135e6, 0.65, old=True, memory=8),
        {"recipe": "ewc and replay", "replay.source": "old", "replay.fraction": 0.15, "ewc.strength": 1.0},
    ),
    "old rows, a long run, near": (
        Scenario(135e6, 0.9, old=True, memory=8, rows=20_000),
        {"replay.fraction": 0.05, "lora.r": 8, "lora.alpha": 16, "lora.targets": "qv", "train.num_train_epochs": 1},
    ),
    "old rows, far": (
        Scenario(135e6, 0.3, old=True, memory=8, rows=20_000),
        {"replay.fraction": 0.25, "lora.r": 32, "lora.alpha": 64, "lora.targets": "all"},
    ),
    "private": (
        Scenario(135e6, private=True, memory=8),
        {"recipe": "private", "der.buffer": 0, "der.source": "self", "distill.strength": 0.5, "replay": None},
    ),
    "private, more tasks to come": (
        Scenario(135e6, private=True, memory=8, tasks=3), {"recipe": "private", "der.own": 32}
    ),
    "7 B, near": (
        Scenario(7e9, 0.9, memory=80, rows=5000),
        {"freeze.share": 0.55, "train.learning_rate": 2e-4, "lora.r": 8, "replay.fraction": 0.2},
    ),
    "7 B, middle": (Scenario(7e9, 0.6, memory=80), {"freeze.share": 0.65, "lora.r": 16}),
    "7 B, far": (Scenario(7e9, 0.2, memory=80), {"freeze.share": 0.75, "lora.r": 32, "replay.fraction": 0.3}),
    "13 B, middle, old rows": (
        Scenario(13e9, 0.6, old=True, memory=80),
        {"freeze.share": 0.85, "ewc.units": "raw", "ewc.strength": 2.2e4},
    ),
    "70 B, far, old rows": (
        Scenario(70e9, 0.2, old=True, memory=640),
        {"freeze.share": 0.97, "ewc.units": "raw", "ewc.strength": 7100.0},
    ),
    "7 B on 24 GB": (
        Scenario(7e9, 0.6, memory=24),
        {"recipe": "weights", "model.dtype": "bfloat16", "model.quantize": "none", "train.gradient_checkpointing": True,
         "lora.r": 8, "distill.strength": 0.5, "ewc.samples": 128},
    ),
    "7 B on 8 GB": (
        Scenario(7e9, 0.6, memory=8),
        {"recipe": "weights", "model.quantize": "4bit", "train.per_device_train_batch_size": 1,
         "train.gradient_accumulation_steps": 8},
    ),
    "7 B on 8 GB, old rows": (
        Scenario(7e9, 0.6, old=True, memory=8), {"recipe": "ewc and replay", "model.quantize": "4bit"}
    ),
    "two tasks and plenty of memory": (
        Scenario(135e6, tasks=2, memory=64),
        {"recipe": "blocks", "blocks.every": 4, "lora": None, "train.learning_rate": 2e-4},
    ),
    "the same, to be served as adapters": (
        Scenario(135e6, tasks=2, memory=64, serve="adapters"), {"recipe": "own rows", "blocks": None, "lora.r": 16}
    ),
    "the same, to be merged": (
        Scenario(135e6, tasks=2, memory=64, serve="merged"), {"recipe": "own rows", "blocks": None}
    ),
    "many tasks": (
        Scenario(135e6, tasks=5, memory=4),
        {"recipe": "sequence", "ilora.decay": 0.9, "label_smoothing.strength": 0.1},
    ),
    "a large model, two tasks": (Scenario(13e9, tasks=2, memory=80), {"recipe": "sequence", "freeze.share": 0.85}),
    "a budget": (Scenario(135e6, lose_at_most=0.01, memory=8), {"recipe": "own rows", "interpolate": None}),
    "few rows": (Scenario(135e6, rows=100, memory=8), {"train.num_train_epochs": 4}),
    "long rows": (
        Scenario(135e6, longest=1500, memory=8),
        {"train.max_length": 1504, "train.per_device_train_batch_size": 2, "train.gradient_checkpointing": True},
    ),
}  # fmt: skip


def advised(scenario: Scenario, name: str | None = None):
    """(recipe, methods with settings, settings of all by path, configuration values)."""
    name = name or recipes.ordered(scenario)[0]
    methods = recipes.method_choices(name, scenario)
    model, train = recipes.model_choices(scenario), recipes.train_choices(name, scenario)
    found = {c.setting: c.value for c in [*model, *train, *(c for _, choices in methods for c in choices)]}
    others = [("private", True, None)] if scenario.private else []
    others += [("old", "old.jsonl", None)] if scenario.old and not scenario.private else []
    others += [("budget", {"lose_at_most": scenario.lose_at_most}, None)] if scenario.lose_at_most else []
    tasks = [{"data": f"data/task{i}.jsonl"} for i in range(scenario.tasks)]
    text = document(["for a test"], tasks, ("starter", model), methods, train, others)
    return name, [m for m, _ in methods], found, yaml.safe_load(text)


@pytest.mark.parametrize(("scenario", "expected"), SCENARIOS.values(), ids=SCENARIOS)
def test_advice_follows_the_tables(scenario, expected):
    name, methods, found, _ = advised(scenario)
    for setting, value in expected.items():
        if setting == "recipe":
            assert name == value
        elif value is None:
            assert setting not in methods
        else:
            assert found[setting] == value


@pytest.mark.parametrize("scenario", [s for s, _ in SCENARIOS.values()], ids=SCENARIOS)
def test_every_recipe_of_every_scenario_is_a_configuration(scenario):
    ranking = recipes.ordered(scenario)
    assert 1 <= len(ranking) <= 3
    assert len(set(ranking)) == len(ranking)
    for name in ranking:
        _, methods, found, values = advised(scenario, name)
        planned = plan(parse(values))
        assert [m.name for m in planned.stack.methods] == methods
        for method in planned.stack.methods:  # the text says what was chosen
            mine = {k.partition(".")[2]: v for k, v in found.items() if k.startswith(f"{method.name}.")}
            assert {key: getattr(method.config, key) for key in mine} == mine
        if scenario.private:
            assert planned.config.private
            assert not planned.config.old
        if scenario.serve == "adapters":
            assert "lora" in methods


def test_ranks_are_those_of_the_presets_of_lora():
    for similarity, domain in ((0.9, "near"), (0.2, "far")):
        rank, targets = rules.first(rules.RANK, Scenario(1e8, similarity)).of(Scenario(1e8, similarity))
        assert {"r": rank, "targets": targets} == PRESETS[domain]


def test_bands_are_closed_where_the_tables_close_them():
    assert [Scenario(1e9, s).closeness for s in (0.81, 0.8, 0.5, 0.49)] == ["near", "middle", "middle", "far"]


def test_room_goes_by_what_is_held_of_every_parameter():
    sizes = (400.0, 180.0, 40.0, 20.0, 8.0, 2.0)
    assert [Scenario(7e9, memory=size).room for size in sizes] == [
        "plenty", "enough", "little", "half", "quantised", "none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"similarity": 1.2}, "similarity is 1.2. Allowed: 0 to 1"),
        ({"memory": 0}, "memory is 0"),
        ({"serve": "merge"}, "Did you mean 'merged'"),
        ({"lose_at_most": 1.0}, "lose_at_most is 1"),
        ({"tasks": 0}, "tasks is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, said):
    with pytest.raises(ConfigError) as error:
        Scenario(1e9, **settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_table_has_a_last_line_that_always_holds():
    for table, _ in rules.TABLES.values():
        assert table[-1].when(Scenario(3e9, 0.7, memory=20))


def test_the_page_shows_the_tables():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "advise.md").read_text(encoding="utf-8")
    assert rules.documents() in page
