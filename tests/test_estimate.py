"""Estimates of a whole run: parts that add up, a warning where it does not fit, nothing that needs weights."""

from __future__ import annotations

import json

import pytest
import torch
from run_kit import response_rows, settings, write_lines
from transformers import AutoConfig

from retain.config import parse
from retain.errors import ConfigError
from retain.estimate import LIBRARIES, Estimate, estimate
from retain.inputs import load_old, load_probes, load_tasks
from retain.models import machine, params
from retain.models.load import load_model, load_tokenizer
from retain.models.machine import Speed
from retain.pipeline import plan, run

#: A machine whose arithmetic takes all the time.
SLOW = Speed({"float32": 1e9, "bfloat16": 1e9, "attention": 1e9}, bytes=1e18, mapped=1e18, start=0.0, waits=True)


@pytest.fixture(autouse=True)
def same_machine(monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda device, half=None: SLOW)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 64 * 2**30)


BOTH = ("count", "which")
_KNOWN: dict[str, Estimate] = {}


def estimated(shop, tmp_path, ask=False, both=False, again=False, **changes):
    """The estimate of a run on one task, or on both; the same question is worked out once, unless `again`."""
    changes = {"tasks": [str(shop / name) for name in BOTH[: 1 + both]]} | changes
    question = json.dumps([str(shop), ask, changes])
    if again or question not in _KNOWN:
        _KNOWN[question] = _worked_out(shop, tmp_path, ask, changes)
    return _KNOWN[question]


def _worked_out(shop, tmp_path, ask, changes):
    config = parse(settings(shop, tmp_path / "run", **changes))
    tokenizer = load_tokenizer(config.model.name)
    planned = plan(config)
    tasks = load_tasks(config, tokenizer, planned.train["max_length"], lambda line: None)
    asked, infos, _ = load_probes(config, tasks, tokenizer, lambda line: None) if ask else ([], [], {})
    found = estimate(planned, tasks, tokenizer, asked, load_old(config), infos)
    assert not (tmp_path / "run").exists(), "nothing is written"
    return found


def test_parts_are_those_of_the_model(shop, tmp_path):
    found = estimated(shop, tmp_path, both=True, methods=["none"])
    model, _ = load_model(str(shop / "model"), tokenizer=False)
    weights = 4 * params.counts(model)[1]
    assert (found.trainable, found.parameters) == params.counts(model)
    assert found.memory["weights"] == found.memory["gradients"] == found.memory["weights at the start"] == weights
    assert found.memory["optimizer states"] == pytest.approx(2 * weights, rel=0.01)
    assert found.memory["Python and libraries"] == LIBRARIES
    assert found.bytes == sum(found.memory.values())
    assert found.seconds == pytest.approx(sum(found.time.values()))
    assert list(found.time) == ["learning count", "learning which"]


def test_adapters_take_less(shop, tmp_path):
    full, lora = (estimated(shop, tmp_path, methods=[method]) for method in ("none", {"lora": {"r": 2}}))
    assert lora.trainable < full.trainable < lora.parameters
    assert lora.memory["weights"] == full.memory["weights"] + 4 * lora.trainable
    assert lora.memory["optimizer states"] < full.memory["optimizer states"] / 5
    assert lora.bytes < full.bytes
    assert lora.seconds < full.seconds


def test_steps_are_those_of_the_run(shop, tmp_path):
    config = parse(settings(shop, tmp_path / "real", probes={"reference": [str(shop / "probes.jsonl")], "limit": 2}))
    found = estimated(shop, tmp_path, both=True)
    real = run(config, lambda line: None)
    assert [work.steps for work in found.tasks] == [step.steps for step in real.training]
    for work, step in zip(found.tasks, real.training):
        assert work.replayed == pytest.approx(step.replay_rows, abs=2)
        assert work.rows == step.new_rows


def test_everything_that_takes_time_is_there(shop, tmp_path):
    methods = [{"lora": {"r": 2}}, {"replay": {"fraction": 0.25}}, "distill", {"ewc": {"samples": 8}}]
    found = estimated(shop, tmp_path, ask=True, both=True, methods=methods, old=None)
    assert list(found.time) == [
        "writing 16 old rows", "learning count", "learning which", "importance of weights", "asking the probes 3 times"
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in found.time.values())
    assert not found.notes
    given = estimated(shop, tmp_path, ask=True, methods=methods)
    assert not any(name.startswith("writing") for name in given.time)
    plain = estimated(shop, tmp_path, methods=methods[:2])
    assert plain.time["learning count"] < given.time["learning count"], "the teacher reads, too"


def test_a_monitor_and_the_base_of_a_divergence_are_counted(shop, tmp_path):
    rows = [{"kind": "divergence", "id": str(i), "prompt": f"Say {i}"} for i in range(3)]
    drift = str(write_lines(tmp_path / "drift.jsonl", rows))
    watch = {"every": 2, "probes": [str(shop / "probes.jsonl")], "anchor_count": 4, "limit": 2}
    asked = {"probes": {"reference": [drift]}}
    plain = estimated(shop, tmp_path, ask=True, methods=["none"], **asked)
    assert list(plain.time)[1:] == ["asking the probes 2 times", "what the base says (divergence)"]
    watched = estimated(shop, tmp_path, ask=True, methods=["none"], monitor=watch, **asked)
    assert list(watched.time) == [*plain.time, "looks of the monitor"]
    assert watched.seconds - plain.seconds == pytest.approx(watched.time["looks of the monitor"])
    assert watched.notes == ["monitor: probes are asked more often where loss or divergence on the anchors rises"]
    often = estimated(shop, tmp_path, ask=True, methods=["none"], monitor=watch | {"every": 1}, **asked)
    assert often.time["looks of the monitor"] > 1.3 * watched.time["looks of the monitor"]
    private = estimated(shop, tmp_path, ask=True, methods=["none"], private=True, **asked)
    base = "what the base says (divergence)"
    assert private.time[base] == pytest.approx(2 * plain.time[base]), "nothing of it is kept from stage to stage"


def test_probes_that_are_asked_at_both_ends_alone_take_less(shop, tmp_path):
    asked = {"reference": [str(shop / "probes.jsonl")]}
    whole = estimated(shop, tmp_path, ask=True, both=True, methods=["none"], probes=asked)
    ends = estimated(shop, tmp_path, ask=True, both=True, methods=["none"], probes=asked | {"between": "tasks"})
    twice, between = "asking all probes twice", "asking those of the tasks 1 times between"
    assert list(ends.time)[2:] == [twice, between]
    assert ends.time[twice] == pytest.approx(2 / 3 * whole.time["asking the probes 3 times"])
    assert 0 < ends.time[between] < ends.time[twice] / 2
    both = {"methods": ["none"], "probes": asked | {"between": "tasks"}}
    once = estimated(shop, tmp_path, ask=True, tasks=[str(shop / "count")], **both)
    assert list(once.time)[1:] == ["asking the probes 2 times"]


def test_more_rows_at_once_and_longer_ones_need_more(shop, tmp_path):
    long = [row | {"response": row["response"] + " one two three" * 4} for row in response_rows(24)]
    write_lines(tmp_path / "long" / "train.jsonl", long)
    tasks = {"tasks": [str(shop / "count")]}
    small, usual = (
        estimated(shop, tmp_path, **tasks, train={"use_cpu": True, "bf16": False, "per_device_train_batch_size": size})
        for size in (1, 4)
    )
    longer = estimated(
        shop, tmp_path, tasks=[str(tmp_path / "long")],
        train={"use_cpu": True, "bf16": False, "per_device_train_batch_size": 4},
    )  # fmt: skip
    for part in ("activations", "logits, a tile"):
        assert small.memory[part] < usual.memory[part] < longer.memory[part]
    assert small.tasks[0].steps == pytest.approx(4 * usual.tasks[0].steps, abs=3)
    assert longer.tasks[0].largest.width > usual.tasks[0].largest.width


def test_checkpointing_lowers_the_activations_and_takes_time(shop, tmp_path):
    train = settings(shop, tmp_path)["train"]
    plain, checkpointed = (
        estimated(shop, tmp_path, methods=["none"], train=train | {"gradient_checkpointing": on})
        for on in (False, True)
    )
    assert checkpointed.memory["activations"] < plain.memory["activations"]
    assert checkpointed.seconds > plain.seconds
    weights = ("weights", "gradients", "optimizer states")
    assert [checkpointed.memory[name] for name in weights] == [plain.memory[name] for name in weights]


def test_bfloat16_keeps_copies_of_the_weights(shop, tmp_path):
    train = settings(shop, tmp_path)["train"] | {"bf16": True}
    half = estimated(shop, tmp_path, methods=["none"], train=train)
    full = estimated(shop, tmp_path, methods=["none"])
    assert 0 < half.memory["half-precision copies"] <= half.memory["weights"] / 2
    assert "half-precision copies" not in full.memory
    assert half.memory["activations"] < full.memory["activations"]


def test_importances_are_kept_and_need_room_of_their_own(shop, tmp_path):
    plain = estimated(shop, tmp_path, methods=["none"])
    ewc = estimated(shop, tmp_path, methods=[{"ewc": {"samples": 8, "batch_size": 16}}])
    assert ewc.memory["importances (ewc)"] == plain.memory["weights"]
    assert ewc.memory["estimating importances"] > 3 * plain.memory["weights"], "gradients, new ones, and their sum"
    assert "gradients" not in ewc.memory, "those of a step are gone by then"


def test_usual_strengths_are_noted_where_units_are_raw(shop, tmp_path):
    raw = {"samples": 8, "units": "raw", "strength": 2e4}
    found = estimated(shop, tmp_path, methods=[{"ewc": raw}])
    assert found.notes == ["ewc: usual strengths at this size are 10000 to 50000 in raw units; yours is 20000"]
    assert estimated(shop, tmp_path, methods=[{"ewc": {"samples": 8}}]).notes == []
    assert "1e-05 to 5e-05" in estimated(shop, tmp_path, methods=["l2sp"]).notes[0]


def test_an_importance_from_elsewhere_takes_no_time_before_the_first_task(shop, tmp_path):
    given = {"samples": 8, "importance": str(shop)}
    times = [
        estimated(shop, tmp_path, methods=[{"ewc": settings}], old=None).time
        for settings in ({"samples": 8}, given, given | {"estimator": "adam"})
    ]
    assert times[0]["importance of weights"] > times[1]["importance of weights"] > 0
    assert "importance of weights" not in times[2]
    assert any(name.startswith("writing") for name in times[0])
    assert not any(name.startswith("writing") for name in times[1])


def test_a_quantised_base_is_smaller(shop, tmp_path):
    lora = [{"lora": {"r": 2}}]
    whole, four = (
        estimated(shop, tmp_path, methods=lora, model={"name": str(shop / "model"), "quantize": kind})
        for kind in ("none", "4bit")
    )
    assert four.memory["weights"] < whole.memory["weights"]
    assert four.trainable == whole.trainable


def test_it_says_when_it_does_not_fit(shop, tmp_path, monkeypatch):
    assert estimated(shop, tmp_path, methods=["none"]).advice == []
    monkeypatch.setattr(machine, "free_bytes", lambda device: LIBRARIES)
    found = estimated(shop, tmp_path, again=True, methods=["none"])
    assert not found.fits
    assert [step.split("=")[0].split()[0] for step in found.advice] == [
        "train.gradient_checkpointing", "train.per_device_train_batch_size", "`lora`", "a"
    ]  # fmt: skip
    lora = estimated(shop, tmp_path, again=True, methods=[{"lora": {"r": 2}}])
    assert any(step.startswith("model.quantize=4bit") for step in lora.advice)
    assert not any("`lora`" in step for step in lora.advice)
    packnet = estimated(shop, tmp_path, again=True, methods=["packnet"]).advice
    assert not any("`lora`" in step for step in packnet), "it would be refused"


def test_experts_are_rehearsed(shop, tmp_path):
    settings_ = json.loads((shop / "model" / "config.json").read_text())
    sizes = {key: settings_[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        "mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=512, **sizes,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "experts")
    load_tokenizer(str(shop / "model")).save_pretrained(tmp_path / "experts")
    found = estimated(shop, tmp_path, model=str(tmp_path / "experts"), methods=["none"])
    assert found.memory["weights"] == 4 * found.parameters, "loaded in float32, whatever they are rehearsed in"
    assert found.memory["activations"] > 0
    assert found.time
    assert found.notes == []


def test_what_cannot_be_rehearsed_is_said(shop, tmp_path, monkeypatch):
    def stubborn(self, batch):
        raise RuntimeError("values are needed.\nAnd more.")

    monkeypatch.setattr("retain.training.rehearsal.Rehearsal.micro_batch", stubborn)
    found = estimated(shop, tmp_path, again=True, methods=["none"])
    assert found.time == {}
    assert found.memory["weights"] > 0
    assert "activations" not in found.memory
    assert found.notes == [
        "activations and time are not in it: this model cannot be rehearsed without weights (values are needed)"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"use_cpu": True, "learning_rate": 1e-3, "optim": "adamw"}}, "trl.SFTConfig says: adamw"),
        ({"methods": [{"freeze": {"share": 1.0, "components": ["norms", "head"]}}]}, "nothing is left to train"),
        ({"tasks": [{"data": "count", "streaming": True}]}, "train.max_steps"),
    ],
)
def test_settings_that_cannot_work_are_found_without_weights(changes, said, shop, tmp_path, monkeypatch):
    monkeypatch.chdir(shop)
    with pytest.raises(ConfigError, match=said):
        estimated(shop, tmp_path, **changes)


def test_the_random_state_is_left_alone(shop, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    estimated(shop, tmp_path, again=True, methods=[{"lora": {"r": 2}}])
    assert torch.equal(torch.rand(3), expected)
