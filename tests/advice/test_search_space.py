"""What a search varies: how it is written, what is refused, and what a configuration becomes."""

from __future__ import annotations

import pytest

from retain.advice.search_space import Over, applied, current, read_over, usual
from retain.config import parse
from retain.errors import ConfigError

METHODS = ["l2sp", {"replay": {"fraction": 0.25}}, {"distill": {"strength": 2.0}}, {"lora": {"r": 6}}]
CONFIG = parse({"tasks": ["new.jsonl"], "methods": METHODS, "old": "old.jsonl", "train": {"learning_rate": 1e-3}})


def test_forms_are_read_and_written_back():
    entries = [
        "methods.distill.strength=0.1..10:log",
        "methods.replay.fraction=0..0.5",
        "methods.lora.r=4,8,16",
        "train.learning_rate=1e-5..1e-3:log",
        "train.max_steps=10..100",
        "train.lr_scheduler_type=linear,cosine",
    ]
    found = read_over(entries, CONFIG)
    assert [one.path for one in found] == [entry.partition("=")[0] for entry in entries]
    assert found[2].values == (4, 8, 16)
    assert found[4].whole, "a number of steps"
    assert not found[1].whole, "0 is written as a whole number, and the share is none"
    assert [str(one) for one in found[:3]] == entries[:3]
    assert [one.distribution().log for one in (found[0], found[1], found[3])] == [True, False, True]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("methods.distill.strength", "expected PATH=RANGE"),
        ("methods.distil.strength=0..1", "unknown 'distil'. Did you mean 'distill'?"),
        ("methods.ewc.strength=0..1", "the configuration has no method 'ewc'. Add it to `methods`"),
        ("methods.distill.strenth=0..1", "unknown 'strenth'. Did you mean 'strength'?"),
        ("methods.distill=0..1", "methods.distill: unknown ''"),
        ("methods.0.distill.strength=0..1", "unknown '0'"),
        ("seed=0,1", "'seed' is not searched. Give methods.NAME.SETTING or train.SETTING"),
        ("probes.limit=1..4", "is not searched"),
        ("methods.distill.strength=3..1", "3 is not below 1"),
        ("methods.distill.strength=0..1:log", "a logarithmic range begins above 0"),
        ("methods.distill.strength=1..10:lin", "unknown scale 'lin'"),
        ("methods.distill.strength=a..b", "the ends of a range are two numbers"),
        ("methods.distill.strength=1", "a list has two values or more"),
        ("methods.distill.strength=1,1", "a list has two values or more"),
        ("methods.distill.strength=-1..1", "-1 is not possible"),
        ("methods.replay.fraction=0..1", "1 is not possible"),
        ("methods.lora.r=4,eight", "eight is not possible"),
        ("train.learning_rat=1e-5..1e-3", "learning_rate"),
        ("train.bf16=true,false", "Set `probes.precision`"),
    ],
)
def test_what_cannot_be_searched_is_one_line(entry, said):
    with pytest.raises(ConfigError) as error:
        read_over([entry], CONFIG)
    assert said in str(error.value)
    assert str(error.value).startswith("--over ")
    assert "\n" not in str(error.value)


def test_twice():
    with pytest.raises(ConfigError, match="given twice"):
        read_over(["methods.lora.r=4,8", "methods.lora.r=8,16"], CONFIG)


def test_the_usual_spaces_lie_around_the_settings():
    assert [str(one) for one in usual(CONFIG)] == [
        "methods.l2sp.strength=0.01..1:log",
        "methods.replay.fraction=0..0.5",
        "methods.distill.strength=0.2..20:log",
        "methods.lora.r=4,6,8,16,32,64",
        "train.learning_rate=0.0002..0.005:log",
    ]


def test_a_strength_with_an_end_stays_below_it():
    config = parse({"tasks": ["new.jsonl"], "methods": [{"interpolate": {"strength": 0.3}}]})
    assert str(usual(config)[0]) == "methods.interpolate.strength=0.03..1:log"


def test_values_become_settings_and_nothing_else_changes():
    made = applied(CONFIG, {"methods.l2sp.strength": 3.0, "methods.lora.r": 4, "train.learning_rate": 1e-4}, output="x")
    assert made.methods == [{"l2sp": {"strength": 3.0}}, METHODS[1], METHODS[2], {"lora": {"r": 4}}]
    assert made.train == {"learning_rate": 1e-4}
    assert made.output == "x"
    left = {"methods", "train", "output"}
    assert made.model_dump(exclude=left) == CONFIG.model_dump(exclude=left)
    assert CONFIG.methods == METHODS


def test_what_the_configuration_has_now_is_the_first_to_try():
    over = read_over(["methods.l2sp.strength=0.01..1:log", "methods.lora.r=4,6"], CONFIG)
    assert current(CONFIG, over) == {"methods.l2sp.strength": 0.1, "methods.lora.r": 6}
    assert current(CONFIG, read_over(["methods.lora.r=4,8"], CONFIG)) is None, "it is not among what is tried"


def test_points_of_a_grid():
    assert Over("x", 0.01, 1.0, log=True).points(3) == [0.01, 0.1, 1.0]
    assert Over("x", 0.0, 0.5).points(3) == [0.0, 0.25, 0.5]
    assert Over("x", 1.0, 3.0, whole=True).points(5) == [1, 2, 3]
    assert Over("x", values=(4, 8)).points(5) == [4, 8]
