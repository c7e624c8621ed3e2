"""Reading configurations: what is written is what is meant, and every mistake is one line."""

import inspect
from pathlib import Path
from typing import get_args

import pytest
import yaml

from retain.config import DEFAULT_METHODS, RunConfig, dump, override, parse, read
from retain.errors import ConfigError, RetainError
from retain.functional.forgetting import verdict_numbers
from retain.methods import build
from retain.results import Thresholds

SHORT = {"tasks": ["data/medical.jsonl"]}


def message(values, where="run.yaml"):
    """The one line that a mistake gives."""
    with pytest.raises(ConfigError) as caught:
        parse(values, where)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults():
    config = parse(SHORT)
    assert config.model.name == "starter"
    assert config.model.dtype == "float32"
    assert config.methods == DEFAULT_METHODS
    assert config.probes.reference == ["core"]
    assert config.probes.confidence == 0.95
    assert config.old is None
    assert config.seed == 0
    assert config.train == {}
    assert config.title == "medical"
    assert config.directory == Path("runs/medical")
    build(config.methods)  # the default methods exist and take their settings


@pytest.mark.parametrize("tasks", ["a.jsonl", ["a.jsonl"], {"data": "a.jsonl"}, [{"data": "a.jsonl"}]])
def test_short_forms_of_tasks_mean_the_same(tasks):
    assert parse({"tasks": tasks}) == parse({"tasks": [{"data": "a.jsonl"}]})


def test_short_form_of_model_means_its_name():
    assert parse(SHORT | {"model": "some/model"}) == parse(SHORT | {"model": {"name": "some/model"}})


def test_probe_sources_with_options():
    config = parse(SHORT | {"probes": {"reference": ["core", {"data": "qa.jsonl", "score": "f1", "max_tokens": 8}]}})
    first, second = config.probes.reference
    assert (first, second.data, second.given()) == ("core", "qa.jsonl", {"score": "f1", "max_tokens": 8})
    assert config.probes.tasks.given() == {}
    assert parse(yaml.safe_load(dump(config))) == config


def test_options_of_probes_are_those_of_the_kinds():
    from retain.config import ProbeOptions
    from retain.probes.answer import SCORES
    from retain.probes.suite import kinds

    assert set(ProbeOptions.model_fields) == set().union(*(cls.settings for cls in kinds().values()))
    assert set(get_args(get_args(ProbeOptions.model_fields["score"].annotation)[0])) == set(SCORES)


@pytest.mark.parametrize("methods", ["ewc", ["ewc"], {"ewc": {}}, [{"ewc": {}}], {"ewc": None}])
def test_forms_of_methods(methods):
    (method,) = build(parse(SHORT | {"methods": methods}).methods)
    assert method.name == "ewc"
    assert method.config == type(method)().config


def test_mapping_of_methods_keeps_settings_and_order():
    config = parse(SHORT | {"methods": {"lora": {"r": 4}, "replay": {"fraction": 0.3}}})
    lora, replay = build(config.methods)
    assert (lora.name, lora.config.r, replay.name, replay.config.fraction) == ("lora", 4, "replay", 0.3)


def test_task_names_come_from_files_folders_and_numbers():
    paths = ["d/medical.jsonl", "d/law/train.csv", "owner/poems", "e/medical.jsonl.gz", "f/medical.parquet"]
    config = parse({"tasks": [*paths, {"data": "x.jsonl", "name": "mine"}]})
    assert config.task_names == ["medical", "law", "poems", "medical-2", "medical-3", "mine"]


def test_output_and_name():
    assert parse(SHORT | {"name": "first"}).directory == Path("runs/first")
    assert parse(SHORT | {"output": "elsewhere/x"}).directory == Path("elsewhere/x")


@pytest.mark.parametrize(
    ("values", "wrong", "near", "place"),
    [
        ({"taks": []}, "taks", "tasks", "run.yaml"),
        ({"model": {"nmae": "x"}}, "nmae", "name", "model"),
        ({"tasks": [{"data": "a", "stramed": True, "streamin": True}]}, "stramed", "streaming", "tasks.0"),
        ({"tasks": ["a", {"data": "a", "columms": {}}]}, "columms", "columns", "tasks.1"),
        ({"probes": {"referense": []}}, "referense", "reference", "probes"),
        ({"probes": {"reference": ["core", {"data": "a", "scor": "f1"}]}}, "scor", "score", "probes.reference.1: "),
        ({"probes": {"tasks": {"layuot": "chat"}}}, "layuot", "layout", "probes.tasks: "),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(values, wrong, near, place):
    line = message(SHORT | values)
    assert line.startswith("run.yaml")
    assert f"unknown '{wrong}'" in line
    assert f"Did you mean '{near}'?" in line
    assert place in line
    assert "Allowed:" in line


def test_allowed_keys_are_those_of_the_right_level():
    assert "revision" in message(SHORT | {"model": {"xyzzy": 1}})
    assert "test_limit" in message({"tasks": [{"data": "a", "xyzzy": 1}]})
    assert "precision" in message(SHORT | {"probes": {"xyzzy": 1}})
    assert "rouge_l" in message(SHORT | {"probes": {"tasks": {"score": "xyzzy"}}})
    assert "probes.reference.0.score" in message(SHORT | {"probes": {"reference": [{"data": "a", "score": "xyzzy"}]}})
    assert "methods" in message(SHORT | {"xyzzy": 1})


def test_unknown_method_and_setting_are_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^methods: unknown 'repaly'\. Did you mean 'replay'\?"):
        build([{"repaly": {}}])
    with pytest.raises(ConfigError, match=r"^methods\.ewc: unknown 'strenght'\. Did you mean 'strength'\?"):
        build([{"ewc": {"strenght": 1}}])
    with pytest.raises(ConfigError, match=r"^methods\.ewc\.strength: .*-1"):
        build([{"ewc": {"strength": -1}}])


def test_unknown_train_key_is_named_with_the_nearest():
    from retain.training import arguments

    with pytest.raises(ConfigError, match=r"^train: unknown 'learning_rte'\. Did you mean 'learning_rate'\?"):
        arguments.check({"learning_rte": 1})
    with pytest.raises(ConfigError, match=r"^train\.seed: set by the run itself"):
        arguments.check({"seed": 1})
    arguments.check({"max_steps": 3, "packing": True})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": "many"}, "seed"),
        ({"model": {"dtype": "float16"}}, "model.dtype"),
        ({"probes": {"confidence": 1.5}}, "probes.confidence"),
        ({"tasks": [{"data": "a", "limit": 0}]}, "tasks.0.limit"),
        ({"tasks": [{"data": "a", "long": "shrink"}]}, "tasks.0.long"),
    ],
)
def test_wrong_values_are_named_with_what_was_given(values, expected):
    line = message(SHORT | values)
    assert line.startswith(f"run.yaml: {expected}: ")
    assert "(given: " in line


def test_thresholds_of_the_verdict():
    assert parse(SHORT).verdict.model_dump() == Thresholds().model_dump()
    weights = inspect.signature(verdict_numbers).parameters
    for name, value in Thresholds().model_dump().items():
        assert name not in weights or weights[name].default == value
    given = parse(SHORT | {"verdict": {"keep_weight": 0.8, "learn_weight": 0.2, "alarm": 0.1, "margin": 0.01}}).verdict
    assert (given.keep_weight, given.learn_weight, given.alarm, given.margin) == (0.8, 0.2, 0.1, 0.01)
    assert "Give both, so that they add up to 1" in message(SHORT | {"verdict": {"keep_weight": 0.8}})
    assert message(SHORT | {"verdict": {"margin": -1}}).startswith("run.yaml: verdict.margin: ")
    assert "verdict.alarm" in message(SHORT | {"verdict": {"alarm": float("inf")}})
    line = message(SHORT | {"verdict": {"max_forgeting": 0.1}})
    assert "Did you mean 'max_forgetting'?" in line


def test_missing_and_empty():
    assert "`tasks` is missing" in message({})
    assert "`tasks.0.data` is missing" in message({"tasks": [{"name": "x"}]})
    assert "tasks" in message({"tasks": []})
    assert "expected settings such as" in message(["not", "settings"])


def test_values_of_the_wrong_shape_are_one_line():
    for values in ({"tasks": 3}, {"tasks": [3]}, {"model": 3}, {"probes": "core"}, {"methods": 3}, {"train": []}):
        assert message(SHORT | values).startswith("run.yaml: ")
    assert "run.yaml" in message({3: 4} | SHORT)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(SHORT).seed = 3


def test_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: some/model\ntasks: [a.jsonl]\nmethods: [lora: {r: 4}, distill]\nseed: 3\n")
    config = read(path)
    assert config.model.name == "some/model"
    assert config.methods == [{"lora": {"r": 4}}, "distill"]
    assert read(path, ["seed=7"]).seed == 7


def test_read_names_the_line_of_malformed_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: x\ntasks: [a.jsonl]\nmethods: [lora: {r: 4\nseed: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:4: not YAML \(.+\)\. Check") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_read_refuses_what_is_not_there_or_not_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read(tmp_path / "none.yaml")
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(ConfigError, match="`tasks` is missing"):
        read(empty)
    text = tmp_path / "list.yaml"
    text.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: expected settings"):
        read(text)
    with pytest.raises(ConfigError, match=r"list\.yaml: expected settings"):
        read(text, ["seed=3"])
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("tasks: [ä.jsonl]".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: "):
        read(latin)


def test_overrides_reach_every_level():
    values = {"tasks": ["a.jsonl", {"data": "b.jsonl"}], "methods": [{"lora": {"r": 4}}]}
    given = [
        "seed=5",
        "train.max_steps=20",
        "train.learning_rate=1.0e-4",
        "model.dtype=bfloat16",
        "tasks.0.limit=7",
        "tasks.1.name=second",
        "methods.0.lora.r=8",
        "probes.reference=[core]",
        "old=",
    ]
    config = parse(override(values, given))
    assert config.seed == 5
    assert config.train == {"max_steps": 20, "learning_rate": 1e-4}
    assert (config.model.name, config.model.dtype) == ("starter", "bfloat16")
    assert (config.tasks[0].data, config.tasks[0].limit) == ("a.jsonl", 7)
    assert config.tasks[1].name == "second"
    assert config.methods == [{"lora": {"r": 8}}]
    assert config.old is None


def test_override_keeps_a_short_form():
    config = parse(override({"model": "some/model", "tasks": ["a.jsonl"]}, ["model.dtype=bfloat16"]))
    assert (config.model.name, config.model.dtype) == ("some/model", "bfloat16")
    single = parse(override({"tasks": "a.jsonl"}, ["tasks.limit=7"]))
    assert (single.tasks[0].data, single.tasks[0].limit) == ("a.jsonl", 7)


@pytest.mark.parametrize(
    "assignment", ["seed", "=3", "tasks.5.limit=3", "tasks.x.limit=3", "tasks.5=a.jsonl", "seed.x.y=3"]
)
def test_impossible_overrides_are_one_line(assignment):
    with pytest.raises(ConfigError) as caught:
        parse(override({"tasks": ["a.jsonl"], "seed": 3}, [assignment]))
    assert "\n" not in str(caught.value)


def test_an_unknown_override_is_an_unknown_key():
    with pytest.raises(ConfigError, match="Did you mean 'seed'"):
        parse(override(dict(SHORT), ["sede=3"]))


def test_dump_reads_back_as_the_same_configuration():
    config = parse(SHORT | {"methods": ["ewc", {"lora": {"r": 2}}], "train": {"max_steps": 3}, "old": "o.jsonl"})
    values = yaml.safe_load(dump(config))
    assert parse(values) == config
    assert set(values) == set(RunConfig.model_fields)


def test_mistakes_are_input_errors():
    assert issubclass(ConfigError, RetainError)
    assert ConfigError("x").exit_code == 2


def test_a_rate_is_a_number_without_a_point_too(tmp_path):
    (tmp_path / "run.yaml").write_text("tasks: [a.jsonl]\ntrain: {learning_rate: 2e-4, lr_scheduler_type: cosine}\n")
    train = read(tmp_path / "run.yaml", ["train.weight_decay=1e-2"]).train
    assert train == {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "weight_decay": 1e-2}
