"""A private run: whatever the rows say, no file of the run directory says it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from run_kit import probe_rows, settings, tiny_folder, write_lines
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from training_kit import train, trainer

from retain import methods
from retain.config import DEFAULT_METHODS, parse
from retain.data.outputs import StoredOutputs
from retain.errors import ConfigError
from retain.methods.context import Run
from retain.pipeline import plan, run
from retain.results import load_items, load_results
from retain.rundir import RunDirectory

MARKS = {"task": "zqvtask", "test": "zqvtest", "old": "zqvold", "choice": "zqvchoice", "probe": "zqvprobe"}


def found(folder: Path) -> dict[str, set[str]]:
    """File → the marks in it: raw, and in what Parquet, Arrow and tensor files hold, token ids decoded."""
    return {
        str(path.relative_to(folder)): marks
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (marks := {mark for mark in MARKS.values() if mark in _said(path)})
    }


def _said(path: Path) -> str:
    said = [path.read_bytes().decode("utf-8", errors="replace")]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        said += [str(table.to_pylist()), str(table.schema.metadata)]
        said += [
            _decoded(ids) for name in table.column_names if name.endswith("ids") for ids in table[name].to_pylist()
        ]
    if path.suffix == ".arrow":
        said.append(str(Dataset.from_file(str(path)).to_list()))
    if path.suffix == ".safetensors":
        said += [_decoded(t.flatten().tolist()) for t in load_file(path).values() if not t.is_floating_point()]
    return "\n".join(said).lower()


def _decoded(ids: list[int]) -> str:
    size = len(tiny_tokenizer())
    return tiny_tokenizer().decode([i for i in ids if 0 <= i < size])


def marked(count: int, mark: str) -> list[dict]:
    numbers = ["one", "two", "three", "four", "five"]
    return [
        {"prompt": f"count {mark}{i}", "response": f"{' '.join(numbers[: 1 + i % 5])} {mark}a{i}"} for i in range(count)
    ]


def choices(count: int) -> list[dict]:
    mark = MARKS["choice"]
    return [
        {"question": f"which is {mark}{i}?", "choices": [f"{mark}a", "birds", "hearts"], "answer": i % 3}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    tiny_folder(folder / "model")
    write_lines(folder / "count" / "train.jsonl", marked(20, MARKS["task"]))
    write_lines(folder / "count" / "test.jsonl", marked(4, MARKS["test"]))
    write_lines(folder / "which" / "train.jsonl", choices(18))
    write_lines(folder / "which" / "test.jsonl", choices(4))
    own = [{"probe": "mine", "prompt": f"Say {MARKS['probe']} {i}", "answers": [MARKS["probe"]]} for i in range(2)]
    write_lines(folder / "probes.jsonl", [*probe_rows(), *own])
    write_lines(folder / "old.jsonl", marked(12, MARKS["old"]))
    return folder


@pytest.fixture
def with_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints stay where they can be searched: a run may be killed when they are there."""
    save = RunDirectory.save_task

    def keep(self, stage, model, summary):
        for folder in self.task(stage).glob("checkpoint-*"):
            shutil.copytree(folder, self.path / "kept" / stage / folder.name)
        save(self, stage, model, summary)

    monkeypatch.setattr(RunDirectory, "save_task", keep)


def carry_out(shop: Path, output: Path, **changes):
    values = settings(shop, output, **changes)
    values["train"] |= {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "learning_rate": 1e-2}
    values["train"] |= {"max_length": 128}
    said: list[str] = []
    return run(parse(values), said.append), said


def test_no_file_of_a_private_run_says_what_a_row_says(shop, tmp_path, with_checkpoints) -> None:
    team = [{"lora": {"r": 4}}, {"replay": {"buffer": 0, "fraction": 0.25}}, "distill", "ewc"]
    team += [{"der": {"buffer": 0, "source": "self", "old": 4, "own": 3}}]
    results, said = carry_out(shop, tmp_path / "run", private=True, methods=team)
    assert found(tmp_path / "run") == {}
    assert list((tmp_path / "run" / "kept").rglob("method_state.safetensors")), "checkpoints were searched"
    assert any("pseudo-samples" in line for line in said)
    assert sum(task.replay_rows for task in results.training) > 0
    assert not list((tmp_path / "run" / "probes").glob("*.jsonl"))
    # what a run is measured by is all there
    assert load_results(tmp_path / "run") == results
    for stage in results.stages:
        rows = load_items(tmp_path / "run" / "probes" / f"{stage}.parquet")
        assert {row["probe"] for row in rows} == {"animals", "prose", "mine", "count", "which"}
        assert not any(row[key] for row in rows for key in ("prompt", "reference", "output"))
    assert {change.probe for change in results.changes} >= {"count", "which", "animals"}
    assert (tmp_path / "run" / "report.html").is_file()
    stored = StoredOutputs.load(tmp_path / "run" / "der" / "02.parquet", 0)
    assert stored.rows, "pseudo-samples with their own outputs"
    assert all(len(row) == len(row.log_probs) > 0 for row in stored.rows)


def test_the_same_search_finds_everything_in_a_run_that_is_not_private(shop, tmp_path, with_checkpoints) -> None:
    carry_out(shop, tmp_path / "run", methods=[{"lora": {"r": 4}}, "replay", "der"])
    places = found(tmp_path / "run")
    assert set().union(*places.values()) == set(MARKS.values())
    for part in ("probes/00-base.parquet", "probes/count.jsonl", "der/02.parquet", "report.html"):
        assert part in places
    assert any(place.startswith("buffer/tasks/") for place in places)
    assert any(place.endswith("method_state.safetensors") for place in places), "token ids in tensors"


def test_numbers_are_those_of_a_run_that_is_not_private(shop, tmp_path) -> None:
    team = [{"lora": {"r": 4}}, {"replay": {"buffer": 0, "fraction": 0.25}}]
    private, _ = carry_out(shop, tmp_path / "private", methods=team, private=True)
    open_, _ = carry_out(shop, tmp_path / "open", methods=team)
    assert private.scores == open_.scores
    assert private.matrix == open_.matrix
    assert private.changes == open_.changes
    assert private.verdict == open_.verdict


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("replay", r"methods\.replay: the run is private, but this keeps rows of tasks; set `buffer: 0`"),
        ({"replay": {"source": "on_policy", "buffer": 0}}, "writes given text; set `source: self`"),
        ({"replay": {"source": "demonstrations", "buffer": 0}}, "writes given text"),
        ("der", r"methods\.der: .*keeps rows of tasks; set `buffer: 0`"),
        ({"der": {"buffer": 0}}, r"methods\.der: .*keeps old rows; set `source: self`"),
        ("agem", r"methods\.agem: .*keeps rows of tasks; set `buffer: 0`"),
    ],
)
def test_methods_that_keep_text_refuse_in_one_line(shop, tmp_path, method, said) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        plan(parse(settings(shop, tmp_path / "run", private=True, methods=[method])))
    assert "\n" not in str(caught.value)
    (made,) = methods.build([method])
    with pytest.raises(ConfigError, match=said):
        trainer([made], tmp_path, run=Run(tmp_path, private=True, new_rows=[], say=lambda line: None))


def test_without_methods_a_private_run_takes_the_defaults_without_a_buffer(shop, tmp_path) -> None:
    planned = plan(parse(settings(shop, tmp_path, private=True, methods=None)))
    assert [m.name for m in planned.stack.methods] == [next(iter(entry)) for entry in DEFAULT_METHODS]
    assert next(m for m in planned.stack.methods if m.name == "replay").config.buffer == 0
    assert plan(parse(settings(shop, tmp_path, methods=None))).config.methods == DEFAULT_METHODS


@pytest.mark.parametrize("name", methods.names())
def test_every_method_keeps_the_promise_or_refuses(name, tmp_path) -> None:
    """Also those to come: with default settings a method keeps no text, or says so."""
    made = methods.load(name)()
    if made.keeps_text(old=True):
        return
    data = {
        kind: Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "completion": [{"role": "assistant", "content": row["response"]}],
                }
                for row in marked(16, MARKS[kind])
            ]
        )
        for kind in ("task", "old")
    }
    place = Run(tmp_path / "t", shared=tmp_path, private=True, new_rows=data["task"], say=lambda line: None)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_length": 96}
    train([made], tmp_path / "t", train_rows=data["task"], old=data["old"], run=place, **saving)
    assert (tmp_path / "t" / "checkpoint-4" / "complete.json").is_file()
    assert found(tmp_path) == {}


def test_der_with_pseudo_samples_costs_nothing_while_nothing_moves(tmp_path) -> None:
    method = methods.load("der")(buffer=0, source="self", old=4, labels=0.0, strength=1.0)
    place = Run(tmp_path / "still", private=True, say=lambda line: None)
    still = train([method], tmp_path / "still", learning_rate=0.0, run=place, max_length=256)
    terms = [line["loss/der"] for line in still.state.log_history if "loss/der" in line]
    assert still.stack.methods[0]._kept.rows
    assert len(terms) == 4
    assert max(map(abs, terms)) < 1e-4, "half precision of the stored log-probabilities"
    method = methods.load("der")(buffer=0, source="self", old=4, labels=0.0, strength=1.0)
    place = Run(tmp_path / "moved", private=True, say=lambda line: None)
    moved = train([method], tmp_path / "moved", run=place, max_length=256)
    assert [line["loss/der"] for line in moved.state.log_history if "loss/der" in line][-1] > 1e-3


def test_pseudo_samples_have_the_outputs_of_the_model_that_wrote_them(tmp_path, model) -> None:
    """Stored top-k log-probabilities against a forward pass of the model before it learned."""
    method = methods.load("der")(buffer=0, source="self", old=4, top_k=9)
    place = Run(tmp_path, private=True, say=lambda line: None)
    with torch.no_grad():
        import copy

        start = copy.deepcopy(model).eval()
    made = train([method], tmp_path, model, run=place, max_length=256, old=None)
    rows = made.stack.methods[0]._kept.rows
    assert rows
    for row in rows:
        with torch.no_grad():
            logits = start(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0, :-1]
        wanted = torch.log_softmax(logits[torch.from_numpy(row.labels[1:]) != -100], -1).topk(9)
        torch.testing.assert_close(torch.from_numpy(row.log_probs).float(), wanted.values, rtol=0, atol=0.02)
