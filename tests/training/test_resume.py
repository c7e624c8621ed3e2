"""A run killed at any moment goes on and ends with the same bits; damaged files are refused in one line."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from run_kit import settings, write_config
from safetensors.torch import load_file
from warm import Script

from retain.config import parse
from retain.errors import RunError
from retain.pipeline import run
from retain.results import load_metrics, load_results
from retain.rundir import RunDirectory
from retain.training import checkpoint

SCRIPT = Path(__file__).parent / "scripts" / "run_config.py"
METHODS = [
    {"lora": {"r": 4, "dropout": 0.1}},
    {"replay": {"fraction": 0.25, "source": "self", "rows": 8, "max_tokens": 24}},
    "distill",
]


def values_of(shop, output, **changes):
    values = settings(shop, output, **({"methods": METHODS, "old": None} | changes))
    values["train"] |= {"save_steps": 2, "max_length": 192}
    return values


def start(config: Path) -> Script:
    return Script(SCRIPT, [str(config)], config.parent)


def finish(config: Path) -> str:
    process = start(config)
    out, err = process.communicate()
    assert process.returncode == 0, out + err[-4000:]
    return out


def left_behind(output: Path) -> dict:
    """Everything a run leaves that must not depend on how often it was killed."""
    found: dict = {}
    for path in sorted(output.glob("tasks/*/*/*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(output)}:{name}"] = tensor
    for path in sorted(output.glob("probes/*.parquet")):
        found[str(path.relative_to(output))] = pq.read_table(path).to_pylist()
    records = load_metrics(output)
    found["steps"] = [{k: v for k, v in r.items() if k != "time"} for r in records if r["kind"] == "step"]
    looks = [{k: v for k, v in r.items() if k != "time"} for r in records if r["kind"] == "look"]
    found["looks"] = sorted(looks, key=lambda r: (r["stage"], r["probe"]))
    results = load_results(output).model_dump()
    results["training"] = [{k: v for k, v in s.items() if k != "seconds"} for s in results["training"]]
    found["results"] = {k: v for k, v in results.items() if k not in ("created", "command", "name")}
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory):
    """An uninterrupted run in a process of its own, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    finish(write_config(folder / "run.yaml", values_of(shop, folder / "run")))
    return folder / "run", time.monotonic() - begin


def moments(seed: int, number: int) -> list[tuple[str, int]]:
    """Seeded moments to kill at: after a number of records, or after a line was said plus a little time."""
    draw = random.Random(seed)
    kinds = ["records", "records", "checkpoint", "done"]
    return [(draw.choice(kinds), draw.randrange(1, 12)) for _ in range(number)]


def reached(output: Path, moment: tuple[str, int]) -> bool:
    kind, number = moment
    if kind == "records":
        return len(load_metrics(output)) >= number
    if kind == "checkpoint":
        return any(output.glob(f"tasks/*/checkpoint-{2 * (1 + number % 3)}"))
    return any(output.glob("tasks/*/done.json"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_runs_end_with_the_same_bits(shop, whole, tmp_path, seed):
    config = write_config(tmp_path / "run.yaml", values_of(shop, tmp_path / "run"))
    draw = random.Random(seed)
    killed = 0
    for moment in moments(seed, 3):
        process = start(config)
        while process.poll() is None and not reached(tmp_path / "run", moment):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(config)
    assert killed >= 1
    assert_same(left_behind(whole[0]), left_behind(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


class Killed(BaseException):
    """Stands for a kill inside this process: nothing catches it."""


def interrupt_at(monkeypatch, owner, name, call=1, after=False):
    """The call-th call of a function ends the run, before or after doing its work."""
    inner, count = getattr(owner, name), [0]

    def interrupted(*args, **kwargs):
        count[0] += 1
        if count[0] == call and not after:
            raise Killed
        result = inner(*args, **kwargs)
        if count[0] == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, interrupted)


def points():
    """(label, owner, function, which call, after it) where files are made: the dangerous moments."""
    import retain.pipeline as pipeline
    import retain.training.watch as watch
    from retain.data.buffer import Buffer
    from retain.training.trainer import ContinualTrainer

    return [
        ("before the first checkpoint is whole", checkpoint, "complete", 1, False),
        ("before a later checkpoint is whole", checkpoint, "complete", 3, False),
        ("after a checkpoint", checkpoint, "complete", 2, True),
        ("before the start is kept", checkpoint, "_save", 1, False),
        ("after the buffer is filled", Buffer, "add", 1, True),
        ("before the model is saved", RunDirectory, "save_task", 1, False),
        ("after the model is saved", RunDirectory, "save_task", 2, True),
        ("before the items are saved", pipeline, "save_items", 2, False),
        ("between looks", watch, "append", 3, True),
        ("before the results of the first task", pipeline, "save_results", 1, False),
        ("after the results of the first task", pipeline, "save_results", 1, True),
        ("before the results", pipeline, "save_results", 2, False),
        ("before a step of the second task", ContinualTrainer, "training_step", 11, False),
    ]


def copied_at(monkeypatch, owner, name, call, after, copy):
    """The call-th call of a function copies what is on the disk, before or after doing its work."""
    inner, count = getattr(owner, name), [0]

    def copying(*args, **kwargs):
        count[0] += 1
        if count[0] == call and not after:
            copy()
        result = inner(*args, **kwargs)
        if count[0] == call and after:
            copy()
        return result

    monkeypatch.setattr(owner, name, copying)


@pytest.fixture(scope="module")
def moments_of_one_run(shop, tmp_path_factory):
    """(Configuration, folder of copies): one run, and for each of `points` its directory as a kill there leaves it."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("moments")
    config = parse(values_of(shop, place / "run"))
    with pytest.MonkeyPatch.context() as patch:
        for number, (_, *point) in enumerate(points()):
            copied_at(patch, *point, lambda to=place / str(number): shutil.copytree(place / "run", to))
        run(config, lambda line: None)
    return config, place


@pytest.mark.parametrize("number", range(13))
def test_interrupted_where_files_are_made(whole, moments_of_one_run, number):
    torch.set_num_threads(1)
    config, place = moments_of_one_run
    shutil.rmtree(place / "run")
    shutil.move(place / str(number), place / "run")
    run(config, lambda line: None)
    assert_same(left_behind(whole[0]), left_behind(place / "run"))


def test_an_exception_leaves_no_more_than_a_kill(shop, whole, tmp_path):
    """What is cleaned up on the way out must not stand in the way of going on."""
    torch.set_num_threads(1)
    config = parse(values_of(shop, tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, *points()[1][1:])
        with pytest.raises(Killed):
            run(config, lambda line: None)
    run(config, lambda line: None)
    assert_same(left_behind(whole[0]), left_behind(tmp_path / "run"))


def test_one_more_task_equals_all_from_the_start(shop, whole, tmp_path):
    torch.set_num_threads(1)
    first = values_of(shop, tmp_path / "run", tasks=[str(shop / "count")])
    run(parse(first), lambda line: None)
    earlier = {f: f.read_bytes() for f in (tmp_path / "run" / "tasks").rglob("*") if f.is_file()}
    stamps = {f: f.stat().st_mtime_ns for f in earlier}
    results = run(parse(values_of(shop, tmp_path / "run")), lambda line: None)
    assert results.stages == ["00-base", "01-count", "02-which"]
    assert {f: f.stat().st_mtime_ns for f in earlier} == stamps
    one, other = left_behind(whole[0]), left_behind(tmp_path / "run")
    # the new task's probe is asked about earlier stages as well, after those that were there
    for stage in ("00-base", "01-count"):
        for found in (one, other):
            rows = found[f"probes/{stage}.parquet"]
            found[f"probes/{stage}.parquet"] = sorted(rows, key=lambda row: (row["probe"], row["item"]))
    assert_same(one, other)


@pytest.fixture(scope="module")
def stopped_once(shop, tmp_path_factory):
    """A run that stopped in the first task after checkpoint-4; (configuration, a copy of its directory)."""
    from retain.training.trainer import ContinualTrainer

    place = tmp_path_factory.mktemp("stopped")
    config = parse(values_of(shop, place / "run", tasks=[str(shop / "count")]))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, ContinualTrainer, "training_step", 6)
        with pytest.raises(Killed):
            run(config, lambda line: None)
    shutil.copytree(place / "run", place / "kept")
    return config, place / "kept"


@pytest.fixture
def stopped(stopped_once):
    """(Configuration, task folder) of that run as it stopped."""
    config, kept = stopped_once
    place = Path(config.directory)
    shutil.rmtree(place)
    shutil.copytree(kept, place)
    folder = place / "tasks" / "01-count"
    assert checkpoint.newest(folder).name == "checkpoint-4"
    return config, folder


def going_on(config) -> list[str]:
    said: list[str] = []
    run(config, said.append)
    return said


def test_half_written_checkpoints_are_passed_over(stopped):
    config, folder = stopped
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    (folder / "checkpoint-6" / checkpoint.MARK).unlink()
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    assert "count: going on from checkpoint-4." in going_on(config)


def test_truncated_metrics_line_is_dropped(stopped):
    config, folder = stopped
    metrics = folder.parents[1] / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"kind": "step", "task": "cou')
    going_on(config)
    lines = metrics.read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, lines) if r["kind"] == "step"]
    assert steps == list(range(1, 9))


def everything(folder: Path) -> dict:
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("damage", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_damaged_checkpoints_are_refused_and_nothing_is_deleted(stopped, damage):
    config, folder = stopped
    file = folder / "checkpoint-4" / damage
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    before = everything(folder)
    with pytest.raises(RunError) as caught:
        going_on(config)
    line = str(caught.value)
    assert "\n" not in line
    assert str(file) in line
    assert "damaged" in line
    assert caught.value.exit_code == 2
    assert everything(folder) == before
    # the advice works: without that folder the run goes on from the one before
    shutil.rmtree(folder / "checkpoint-4")
    assert "count: going on from checkpoint-2." in going_on(config)


def test_a_missing_file_of_a_checkpoint_is_damage(stopped):
    config, folder = stopped
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(RunError, match=r"scheduler\.pt: damaged"):
        going_on(config)


def test_a_damaged_mark_is_damage(stopped):
    config, folder = stopped
    (folder / "checkpoint-4" / checkpoint.MARK).write_text('{"a": [')
    with pytest.raises(RunError, match=r"complete\.json: damaged"):
        going_on(config)


def test_damaged_or_foreign_start_is_refused(stopped, shop):
    config, folder = stopped
    path = folder / checkpoint.START
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(RunError, match=r"start\.safetensors: damaged") as caught:
        going_on(config)
    assert "\n" not in str(caught.value)
    path.write_bytes(content)
    going_on(config)


def test_exit_code_of_a_damaged_checkpoint(stopped, tmp_path):
    config, folder = stopped
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    path = write_config(tmp_path / "again.yaml", config.model_dump(mode="json"))
    process = start(path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out.splitlines()[-1].startswith("ERROR RunError ")


def test_resolve(tmp_path):
    assert checkpoint.resolve(None, tmp_path) is None
    assert checkpoint.resolve(False, tmp_path) is None
    with pytest.raises(RunError, match="no complete checkpoint"):
        checkpoint.resolve(True, tmp_path)
    with pytest.raises(RunError, match="not finished"):
        checkpoint.resolve(tmp_path / "checkpoint-3", tmp_path)
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(f"{step}")
        checkpoint.complete(folder, {"ewc/f": torch.ones(2)})
    assert checkpoint.resolve(True, tmp_path) == tmp_path / "checkpoint-10"
    assert torch.equal(checkpoint.load_state(tmp_path / "checkpoint-2")["ewc/f"], torch.ones(2))
    assert checkpoint.load_state(tmp_path) == {}


def test_other_configurations_are_refused(shop, stopped):
    config, folder = stopped
    before = everything(folder)
    for changes, word in (
        ({"seed": 5}, "seed"),
        ({"methods": ["none"]}, "methods"),
        ({"tasks": [str(shop / "which")]}, "tasks"),
        ({"tasks": [{"data": str(shop / "count"), "limit": 4}]}, "tasks"),
        ({"old": str(shop / "old.jsonl")}, "old"),
    ):
        with pytest.raises(RunError, match=f"a run with other `{word}`") as caught:
            run(parse(values_of(shop, config.directory, **({"tasks": [str(shop / "count")]} | changes))), str)
        assert "\n" not in str(caught.value)
    assert everything(folder) == before
