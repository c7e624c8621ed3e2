"""Two processes equal one process on the same global batch, and only one of them writes."""

import json
from pathlib import Path

import pytest
import torch
from run_kit import settings, workshop, write_config
from safetensors.torch import load_file

from retain.results import load_items, load_metrics, load_results
from retain.training import checkpoint

CASES = (
    *("none", "replay-distill", "ewc", "mas", "si", "agem", "sam", "key_layers", "l2sp"),
    *("self", "on_policy", "priority", "sources", "stages"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the same trainings on one process (4 rows per device) and on two (2 rows per device)."""
    return tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two"), {}


@pytest.fixture
def both(trained, launch):
    """The two folders; trained on first use."""
    one, two, done = trained
    if not done:
        launch("train_cases.py", one, 4, processes=1)
        launch("train_cases.py", two, 2, processes=2)
        done["yes"] = True
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_same_weights(both, case):
    one, two = (load_file(folder / f"{case}.safetensors") for folder in both)
    assert one.keys() == two.keys()
    worst = max(float((one[name] - two[name]).abs().max()) for name in one)
    # weights are float64, but the head sums in float32, in another order, and Adam divides small gradients by
    # their own size; the weights themselves move by about 4e-2
    assert worst < 3e-6, worst
    if case != "none":
        plain = load_file(both[0] / "none.safetensors")
        assert one.keys() != plain.keys() or any(not torch.equal(one[name], plain[name]) for name in one)


@pytest.mark.parametrize("case", ["replay-distill", "self", "on_policy", "priority", "sources"])
def test_same_rows_at_every_step(both, case):
    def windows(folder: Path, processes: int) -> list[list[tuple]]:
        """Rows of each optimizer step, in any order within the step, with their origin."""
        ranks = [torch.load(folder / f"{case}-seen-{rank}.pt") for rank in range(processes)]
        steps = []
        for first in range(0, len(ranks[0]), 2):
            found = []
            for seen in ranks:
                for batch in seen[first : first + 2]:
                    for ids, labels, source in zip(batch["ids"], batch["labels"], batch["source"]):
                        found.append((source, tuple(i for i, label in zip(ids, labels) if label != -100), tuple(ids)))
            steps.append(sorted((source, answer) for source, answer, _ in found))
        return steps

    one, two = windows(both[0], 1), windows(both[1], 2)
    assert one == two
    assert any(source == 1 for step in one for source, _ in step)
    if case == "sources":  # two steps without and with a block; two sources
        assert [sum(source > 0 for source, _ in step) for step in one] == [1, 3, 1, 3]
        assert {source for step in one for source, _ in step} == {0, 1, 2}


@pytest.mark.parametrize("case", ["ewc", "mas", "si", "stages"])
def test_every_process_has_the_same_importance(both, case):
    first, second = (load_file(both[1] / f"{case}-fisher-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("case", "method"), [("stages", "ewc"), ("mas", "mas"), ("si", "si")])
def test_the_task_leaves_the_same_importance(both, case, method):
    """What the next task is held by, from weights that agree to about 1e-6."""
    one, two = (load_file(folder / case / "shared" / method / "02.safetensors") for folder in both)
    assert one.keys() == two.keys()
    for name in one:
        size = float(one[name].abs().max())
        assert float((one[name] - two[name]).abs().max()) < 1e-3 * size, name


@pytest.mark.parametrize("case", CASES)
def test_files_are_written_once_and_whole(both, case):
    folder = both[1] / case
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    for name in ("checkpoint-2", "checkpoint-4"):
        checkpoint.check(folder / name)
    steps = [record["step"] for record in load_metrics(folder)]
    assert steps == [1, 2, 3, 4]
    assert not list(folder.rglob("*.part"))


def test_logged_losses_are_those_of_all_processes(both):
    one, two = (load_metrics(folder / "replay-distill") for folder in both)
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "loss/main", "loss/distill"):
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-6), key
        assert b["loss/main"] + b["loss/distill"] == pytest.approx(b["loss"], rel=2e-4)


def test_buffer_holds_the_task_once(both):
    state = json.loads((both[1] / "stages" / "shared" / "buffer" / "tasks" / "state.json").read_text())
    assert state["seen"] == 24


@pytest.mark.slow
def test_a_whole_run_on_two_processes(tmp_path, launch):
    shop = workshop(tmp_path / "shop")
    methods = [{"replay": {"fraction": 0.25, "rows": 8, "source": "self"}}, "distill", {"ewc": {"samples": 8}}]
    for name, batch, processes in (("one", 4, 1), ("two", 2, 2)):
        values = settings(shop, tmp_path / name, methods=methods, old=None)
        values["train"] |= {"per_device_train_batch_size": batch, "save_steps": 3, "max_length": 192}
        config = write_config(tmp_path / f"{name}.yaml", values)
        said = launch("run_config.py", config, processes=processes, torchrun=processes > 1)
        assert said.count("the model wrote") == 1
    one, two = (load_results(tmp_path / name) for name in ("one", "two"))
    assert [(s.steps, s.new_rows, s.replay_rows) for s in one.training] == [
        (s.steps, s.new_rows, s.replay_rows) for s in two.training
    ]
    steps = [(r["task"], r["step"]) for r in load_metrics(tmp_path / "two") if r["kind"] == "step"]
    assert steps == [(s.task, i) for s in two.training for i in range(1, s.steps + 1)]
    for stage in one.stages:
        before, after = (load_items(tmp_path / name / "probes" / f"{stage}.parquet") for name in ("one", "two"))
        assert [row["item"] for row in before] == [row["item"] for row in after]
        for a, b in zip(before, after):
            if a["probe"] == "prose":
                assert a["score"] == pytest.approx(b["score"], rel=1e-4)
    for stage in ("01-count", "02-which"):
        weights = [load_file(tmp_path / n / "tasks" / stage / "model" / "model.safetensors") for n in ("one", "two")]
        assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 2e-5
    # running it again, alone, finds everything done
    values = settings(shop, tmp_path / "two", methods=methods, old=None)
    assert (tmp_path / "two" / "report.html").is_file()
    assert not list((tmp_path / "two").rglob("*.part"))


def test_written_rows_are_off_the_items_that_one_process_knows(tmp_path, launch):
    """Both processes read what the main one wrote, also where it has taken rows out since."""
    launch("avoid_cases.py", tmp_path)
    found = [[json.loads((tmp_path / f"{n}-{rank}.json").read_text()) for rank in range(2)] for n in (1, 2, 3)]
    assert all(main["rows"] == other["rows"] and not other["calls"] for main, other in found)
    first, second, third = (main["rows"] for main, _ in found)
    assert first
    assert not [row for row in first if "postcards" in str(row)]
    assert [row for row in first if "lamp" in str(row)]
    assert third == second == [row for row in first if "lamp" not in str(row)]
