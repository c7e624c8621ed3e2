"""What a model writes to replay it repeats no item of the probes: in whole runs, and for whoever asks for rows."""

from __future__ import annotations

from itertools import count

import pytest
from datasets import Dataset
from run_kit import in_many_calls, probe_rows, response_rows, settings, workshop, write_lines
from training_kit import rows, train

from retain.config import parse
from retain.data.filters import Avoided
from retain.data.leaks import texts_of
from retain.data.outputs import StoredOutputs
from retain.errors import DataError
from retain.methods.context import Run
from retain.methods.der import DER
from retain.methods.replay import Replay
from retain.models import generation
from retain.models.endpoint import Endpoint
from retain.models.generation import Generated
from retain.models.own_rows import about
from retain.pipeline import run
from retain.probes import asking
from retain.training.trainer import ContinualTrainer

ITEMS = [row[key] for row in probe_rows() for key in ("prompt", "text") if key in row]
LATER = "the old clock in the tower of our town stands still"
SUBSPACE = {"subspace": {"share": 0, "energy": 0.9}}
THINGS = ("river", "stone", "music", "garden", "winter", "paper", "engine", "ocean", "candle", "forest", "bridge")


def text(number: int) -> str:
    """What is said at a call: each third time an item of the probes, once what will be one."""
    if number % 3 == 0:
        return ITEMS[number // 3 % len(ITEMS)]
    return LATER if number == 10 else " ".join(THINGS[number * k % 11] for k in (1, 3, 5)) + f" {THINGS[number // 11]}"


@pytest.fixture
def quoting(monkeypatch):
    """A model that knows the probes by heart, as instructions and as answers; what it said."""
    said, numbers = [], count()

    def speak(model, tokenizer, prompts, *rest):
        new = [Generated(" " + text(next(numbers) % 110), 5, True) for _ in prompts]
        said.extend(answer.text for answer in new)
        return new

    assert asking.generate is generation.generate  # imported by name before it is replaced: probes ask the real one
    monkeypatch.setattr(generation, "generate", speak)
    return said


@pytest.fixture
def replayed(monkeypatch):
    """The text of every row that a step learned from and that was not of its task."""
    found, loss = [], ContinualTrainer.compute_loss

    def spy(self, model, inputs, *rest, **more):
        source = inputs.get("source", ())
        for ids, origin in zip(inputs["input_ids"], source):
            if origin > 0:
                found.append(self.processing_class.decode(ids, skip_special_tokens=True))
        return loss(self, model, inputs, *rest, **more)

    monkeypatch.setattr(ContinualTrainer, "compute_loss", spy)
    return found


def written(folder, name="self"):
    path = folder / "buffer" / f"{name}.parquet"
    return Dataset.from_parquet(str(path), cache_dir=str(folder / "cache")).to_list()


def repeats(found, avoid=ITEMS):
    avoided = Avoided(avoid)
    return [text for row in found for text in texts_of(row) if avoided(text)]


# -- whole runs --------------------------------------------------------------------------------------------
def test_a_run_replays_no_item_of_its_probes(quoting, replayed, tmp_path, monkeypatch):
    """Without old rows; a later task's questions are known when it comes, and its rows then leave those written."""
    in_many_calls(monkeypatch)
    shop = workshop(tmp_path / "shop")
    write_lines(shop / "which" / "test.jsonl", [{"prompt": LATER, "response": "one"}, *response_rows(3, 100)])
    write_lines(shop / "which" / "train.jsonl", response_rows(18, 50))

    def go(*names):
        values = settings(shop, tmp_path / "run", tasks=[str(shop / name) for name in names], old=None)
        values["methods"] = [{"replay": {"rows": 24, "fraction": 0.5}}]
        values["train"] |= {"max_length": 192}
        run(parse(values), lambda line: None)
        seen = list(replayed)
        replayed.clear()
        return written(tmp_path / "run"), seen

    first, seen = go("count")
    assert any(item in said for said in quoting for item in ITEMS), "the model says them"
    assert len(first) >= 20
    assert len(set(seen)) >= 20
    assert not repeats(first)
    assert not [row for row in seen if any(item in row for item in ITEMS)]
    assert repeats(first, [LATER])
    quoting.clear()
    second, seen = go("count", "which")
    assert not quoting, "written once"
    assert second == [row for row in first if LATER not in str(row)]
    assert about(tmp_path / "run" / "buffer" / "self.parquet")["left out later"] == len(first) - len(second) > 0
    assert seen
    assert not [row for row in seen if any(item in row for item in [*ITEMS, LATER])]
    assert go("count", "which")[0] == second


# -- whoever asks for rows ---------------------------------------------------------------------------------
def run_of(folder, index=1, **more):
    place = folder / str(index)
    return Run(place, task_index=index, shared=folder, say=lambda line: None, avoid=ITEMS, **more)


@pytest.mark.parametrize(
    "settings",
    [{"source": "self"}, {"sources": [{"data": "self"}]}, {"source": "self", "priority": "length"}],
)
def test_every_kind_of_self_written_rows(quoting, settings, tmp_path):
    made = train([Replay(fraction=0.5, rows=12, **settings)], tmp_path / "1", old=None, run=run_of(tmp_path))
    assert made.run.has_replay
    assert written(tmp_path)
    assert not repeats(written(tmp_path))


def test_a_server_knows_the_items_too(tmp_path, monkeypatch):
    numbers = count()
    monkeypatch.setattr(Endpoint, "_answer", lambda *rest: Generated(" " + text(next(numbers) % 110), 5, True))
    server = {"url": "http://127.0.0.1:1/v1", "model": "big"}
    method = Replay(fraction=0.5, rows=12, source="self", endpoint=server)
    train([method], tmp_path / "1", old=None, run=run_of(tmp_path))
    assert written(tmp_path)
    assert not repeats(written(tmp_path))


def test_answers_of_demonstrations_and_on_policy(quoting, tmp_path):
    method = Replay(fraction=0.5, rows=12, source="demonstrations")
    train([method], tmp_path / "a" / "1", old=rows(6, 100), run=run_of(tmp_path / "a"))
    assert "near a probe item" in about(tmp_path / "a" / "buffer" / "demonstrations-01.parquet")["dropped"]
    assert not repeats(written(tmp_path / "a", "demonstrations-01"))
    right = rows(6, 100).map(lambda row: {"completion": [{"role": "assistant", "content": "ships"}]})
    method = Replay(fraction=0.5, source="on_policy", on_policy={"check": "f1", "threshold": 1e-9})
    train([method], tmp_path / "b" / "1", old=right, run=run_of(tmp_path / "b"))
    assert about(tmp_path / "b" / "buffer" / "on-policy-01.parquet")["failed"]["near a probe item"] > 0
    assert not repeats(written(tmp_path / "b", "on-policy-01"))


@pytest.mark.parametrize("private", [False, True])
def test_rows_that_der_asks_for(quoting, private, tmp_path):
    """Of the base, and of the model that has learned a task."""
    method = DER(source="self", old=8, own=8, buffer=0)
    given = Dataset.from_list([{"text": "zebulonius"}])
    made = train([method], tmp_path / "1", run=run_of(tmp_path, private=private, new_rows=given), old=None)
    stored = StoredOutputs.load(tmp_path / "der" / "02.parquet", 0).rows
    assert {row.task for row in stored} == {0, 1}
    said = [made.processing_class.decode(row.input_ids, skip_special_tokens=True) for row in stored]
    assert not [text for text in said if any(item in text for item in ITEMS)]


@pytest.mark.parametrize("method", ["ewc", "mas", "features", "agem", "shield", "key_layers", SUBSPACE])
def test_rows_that_other_methods_ask_for(quoting, method, tmp_path):
    from retain.methods import build

    train(build([method]), tmp_path / "1", old=None, run=run_of(tmp_path), steps=1, max_length=192)
    assert written(tmp_path)
    assert not repeats(written(tmp_path))


# -- killed, and begun with other probes -------------------------------------------------------------------
def test_a_killed_writing_goes_on_to_rows_off_the_items_of_now(tmp_path, monkeypatch):
    in_many_calls(monkeypatch)
    calls, dies = [], [3]

    def speak(model, tokenizer, prompts, limit, temperature, top_p, draw):
        calls.append(draw)
        if len(calls) == dies[0]:
            raise KeyboardInterrupt
        return [Generated(" " + text((37 * draw + place) % 110), 5, True) for place in range(len(prompts))]

    monkeypatch.setattr(generation, "generate", speak)

    def go(name, avoid):
        calls.clear()
        place = Run(tmp_path / name, shared=tmp_path / name, say=lambda line: None, avoid=avoid)
        made = train([Replay(fraction=0.5, rows=30)], tmp_path / name, old=None, run=place)
        return list(made.run.replay["input_ids"])

    with pytest.raises(KeyboardInterrupt):
        go("killed", [])
    dies[0] = 0
    again = go("killed", ITEMS)
    assert 0 not in calls, "the first call is not made again"
    assert again == go("straight", ITEMS)
    assert not repeats(written(tmp_path / "killed"))
    assert go("killed", ITEMS) == again
    assert not calls


def test_when_every_row_would_go_it_says_so(quoting, tmp_path):
    method = Replay(fraction=0.5, rows=6)
    place = run_of(tmp_path)
    train([method], tmp_path / "1", old=None, run=place)
    everything = [said for row in written(tmp_path) for said in texts_of(row)]
    place = Run(tmp_path / "2", task_index=2, shared=tmp_path, say=lambda line: None, avoid=everything)
    with pytest.raises(DataError, match=r"self\.parquet: every row repeats .* Start a new run") as caught:
        train([Replay(fraction=0.5, rows=6)], tmp_path / "2", old=None, run=place)
    assert "\n" not in str(caught.value)
