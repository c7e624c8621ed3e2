"""What is refused before a run begins, and what is left of one that breaks."""

import json

import pytest
from run_kit import carry_out, settings, write_lines
from safetensors import SafetensorError

from retain.config import parse
from retain.errors import ConfigError, DataError, RetainError, RunError, TrainingDiverged, disk_full
from retain.methods import build
from retain.pipeline import plan
from retain.results import load_metrics
from retain.rundir import RunDirectory


def test_plan_needs_no_weights(shop, tmp_path):
    planned = plan(parse(settings(shop, tmp_path, model="nowhere/at-all")))
    assert planned.stages == ["00-base", "01-count", "02-which"]
    assert planned.train["learning_rate"] == 1e-3
    assert "max_steps" not in planned.train


def test_learning_rate_depends_on_what_learns(shop, tmp_path):
    train = {"use_cpu": True}
    full = plan(parse(settings(shop, tmp_path, train=train))).train["learning_rate"]
    lora = plan(parse(settings(shop, tmp_path, train=train, methods=["lora"]))).train["learning_rate"]
    assert lora == 10 * full


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"methods": [{"replay": {"source": "old"}}], "old": None}, ConfigError, "methods.replay: needs 'old'"),
        ({"methods": ["ewc", "l2sp"]}, ConfigError, "cannot be combined"),
        ({"methods": ["repaly"]}, ConfigError, "Did you mean 'replay'"),
        ({"train": {"learnin_rate": 1}}, ConfigError, "Did you mean 'learning_rate'"),
        ({"tasks": ["nowhere.jsonl"]}, DataError, "nowhere.jsonl"),
        ({"model": "no-such-folder/here"}, RetainError, "model.name"),
        ({"probes": {"reference": ["nothing-here"]}}, DataError, "nothing-here"),
        ({"tasks": [{"data": "{shop}/count", "on": "assistant"}]}, RetainError, "generation"),
        ({"old": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        (
            {"tasks": [{"data": "{shop}/count/train.jsonl", "hold_out": 0}], "probes": {"reference": []}},
            DataError,
            "nothing to measure",
        ),
        ({"model": {"name": "starter", "quantize": "4bit"}}, ConfigError, "model.quantize"),
        (
            {"model": {"name": "starter", "quantize": "4bit"}, "methods": ["lora", "interpolate"]},
            ConfigError,
            "one adapter learns all tasks",
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(shop, tmp_path, changes, kind, words):
    changes = json.loads(json.dumps(changes).replace("{shop}", str(shop)))
    with pytest.raises(kind) as caught:
        carry_out(shop, tmp_path / "run", **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def texts(path, count):
    return str(write_lines(path, [{"text": f"Seven small ships {i} sailed north."} for i in range(count)]))


def test_a_few_texts_are_a_task(shop, tmp_path):
    task = {"data": texts(tmp_path / "texts.jsonl", 6), "on": "all"}
    results, _ = carry_out(shop, tmp_path / "run", tasks=[task], methods=["none"], old=None)
    assert next(info.items for info in results.probes if info.task) == 2
    assert results.scores["00-base"]["texts"].low < results.scores["00-base"]["texts"].high


@pytest.mark.parametrize(
    ("probes", "words"),
    [
        (
            {"reference": [{"data": "{shop}/probes.jsonl", "score": "f1"}]},
            "score has no effect on probes of kind choice",
        ),
        (
            {"reference": ["{shop}/probes.jsonl"], "tasks": {"window": 8}},
            "probes.tasks: window has no effect on probes of",
        ),
    ],
)
def test_an_option_that_no_probe_has_is_refused(shop, tmp_path, probes, words):
    with pytest.raises(ConfigError, match=words):
        carry_out(shop, tmp_path / "run", probes=json.loads(json.dumps(probes).replace("{shop}", str(shop))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": [{"data": "{few}", "on": "all"}]}, "tasks.few: 1 item for 'few' given; perplexity needs at least 2"),
        ({"tasks": [{"data": "{few}", "on": "all", "test": "{one}"}]}, "Give more test rows, with `test:`"),
        ({"tasks": [{"data": "{few}", "on": "all", "test": "{few}", "test_limit": 1}]}, "Raise test_limit."),
        ({"probes": {"reference": ["{shop}/probes.jsonl"], "limit": 1}}, "1 item for 'prose' given"),
        ({"probes": {"reference": ["{shop}/probes.jsonl"], "limit": 1}}, "Raise probes.limit."),
        ({"probes": {"reference": ["{one}"]}}, "one.jsonl: 1 item for 'one' given; perplexity"),
    ],
)
def test_too_few_items_for_an_interval_are_found_before_anything_is_written(shop, tmp_path, changes, words):
    places = {"shop": str(shop), "few": texts(tmp_path / "few.jsonl", 2), "one": texts(tmp_path / "one.jsonl", 1)}
    filled = json.dumps(changes)
    for name, place in places.items():
        filled = filled.replace("{" + name + "}", place)
    with pytest.raises(DataError) as caught:
        carry_out(shop, tmp_path / "run", **json.loads(filled))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_answers_are_kept_when_their_numbers_fail(shop, tmp_path, monkeypatch):
    from retain import analysis
    from retain.probes import asking

    def broken(*given, **options):
        raise RunError("probe 'animals': no numbers")

    changes = {"tasks": [str(shop / "count")], "methods": ["none"], "old": None}
    changes["train"] = settings(shop, tmp_path)["train"] | {"max_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(analysis, "score", broken)
        with pytest.raises(RunError, match="no numbers"):
            carry_out(shop, tmp_path / "run", **changes)
    asked = []
    ask = asking.ask
    monkeypatch.setattr(asking, "ask", lambda probes, *given: asked.append(len(probes)) or ask(probes, *given))
    results, _ = carry_out(shop, tmp_path / "run", **changes)
    assert asked == [3], "only the stage after the task is asked"
    assert set(results.scores["00-base"]) == {"animals", "prose", "count"}
    looks = [r["stage"] for r in load_metrics(tmp_path / "run") if r["kind"] == "look"]
    assert looks == ["00-base"] * 3 + ["01-count"] * 3
    assert sorted(f.name for f in (tmp_path / "run" / "probes").glob("0*")) == ["00-base.parquet", "01-count.parquet"]


def test_a_diverging_method_stops_the_run_and_keeps_the_checkpoint(shop, tmp_path, monkeypatch):
    distill = type(build(["distill"])[0])
    monkeypatch.setattr(
        distill,
        "batch_loss",
        lambda self, batch, run: batch.hidden.sum() * (float("nan") if run.step == 3 else 0.0),
    )
    train = settings(shop, tmp_path)["train"] | {"save_steps": 2}
    with pytest.raises(TrainingDiverged) as caught:
        carry_out(shop, tmp_path / "run", methods=["distill"], train=train)
    line = str(caught.value)
    assert "\n" not in line
    assert "training step 4" in line
    assert "loss/distill" in line
    assert "checkpoint-2" in line
    folder = tmp_path / "run" / "tasks" / "01-count"
    from retain.training import checkpoint

    checkpoint.check(folder / "checkpoint-2")
    assert RunDirectory(tmp_path / "run").done("01-count") is None
    monkeypatch.undo()  # with the cause removed the same run goes on from there
    results, said = carry_out(shop, tmp_path / "run", methods=["distill"], train=train)
    assert "count: going on from checkpoint-2." in said
    assert results.training[0].steps == 6


def safetensors_full(tensors, path, *given, **named):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def torch_full(what, path, *given, **named):
    try:
        raise RuntimeError("basic_ios::clear: iostream error")
    except RuntimeError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534") from None


def parquet_full(rows, path):
    raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "writer", "reason"),
    [
        ("retain.training.checkpoint", "save_file", safetensors_full, "(os error 28)"),
        ("torch", "save", torch_full, "unexpected pos 576 vs 534"),
        ("retain.pipeline", "save_items", parquet_full, "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(shop, tmp_path, monkeypatch, place, name, writer, reason):
    changes = {"tasks": [str(shop / "count")], "methods": ["l2sp"], "old": None}
    changes["train"] = settings(shop, tmp_path)["train"] | {"max_steps": 2, "save_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(f"{place}.{name}", writer)
        with pytest.raises(RunError) as caught:
            carry_out(shop, tmp_path / "run", **changes)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'run'}: the disk is full (")
    assert reason in line
    assert "\n" not in line
    assert "run the same command again" in line
    results, _ = carry_out(shop, tmp_path / "run", **changes)
    assert results.training[0].steps == 2


def test_other_failures_are_not_called_a_full_disk():
    for error in (OSError(13, "Permission denied"), RuntimeError("mat1 and mat2"), KeyError("os error 28")):
        assert not disk_full(error)
    outer = ValueError("outer")
    outer.__context__ = OSError(28, "No space left on device")
    assert disk_full(outer) == "[Errno 28] No space left on device"


def test_no_disk_space_is_found_before_anything_is_written(shop, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match="are needed for checkpoints"):
        carry_out(shop, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_huge_learning_rate_is_stopped(shop, tmp_path):
    train = settings(shop, tmp_path)["train"] | {"learning_rate": 1e38, "max_grad_norm": 0.0, "save_steps": 1}
    with pytest.raises(TrainingDiverged, match="training step ") as caught:
        carry_out(shop, tmp_path / "run", methods=["none"], old=None, train=train)
    assert "\n" not in str(caught.value)
    from safetensors.torch import load_file

    for path in (tmp_path / "run").rglob("checkpoint-*/model.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), path
