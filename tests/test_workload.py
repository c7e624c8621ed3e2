"""Rows, tokens and steps of a run, against what the trainer then does."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from run_kit import carry_out
from training_kit import rows, trainer

from retain.data.mixture import Mixture
from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.replay import Replay
from retain.models.generation import render
from retain.probes.suite import probes_from_rows
from retain.training.looks import Looker, anchor_texts
from retain.training.monitor import ForgettingMonitor
from retain.training.rehearsal import Batch
from retain.workload import (
    Lengths,
    TaskWork,
    calls_to_write,
    measured,
    questions,
    rows_to_write,
    said_by_base,
    task_work,
    watching,
    written_lengths,
)

NO_STEPS = {"max_steps": -1}


def sizes(number: int, tokens: int, learned: int) -> Lengths:
    return Lengths(np.full(number, tokens), np.full(number, learned))


@pytest.mark.parametrize(
    ("replay", "train"),
    [
        (None, {"num_train_epochs": 3}),
        (None, {"num_train_epochs": 2.5}),
        (None, {"gradient_accumulation_steps": 3, "num_train_epochs": 2}),
        (None, {"max_steps": 7}),
        ({"fraction": 0.3}, {"num_train_epochs": 1}),
        ({"fraction": 0.3}, {"num_train_epochs": 2, "gradient_accumulation_steps": 2}),
        ({"fraction": 0.25}, {"max_steps": 9}),
        ({"fraction": 0.4, "schedule": "linear", "end": 0.1}, {"num_train_epochs": 3}),
    ],
)
def test_steps_are_those_of_the_trainer(replay, train, tmp_path):
    settings = {"per_device_train_batch_size": 4} | NO_STEPS | train
    methods = [Replay(**replay)] if replay else []
    steps = settings.pop("max_steps")
    settings.pop("per_device_train_batch_size")
    made = trainer(methods, tmp_path, train_rows=rows(26), steps=steps, batch=4, **settings)
    made.train()
    _, replayed = made.rows_seen()
    work = task_work(
        "task",
        26,
        sizes(26, 20, 5),
        {"per_device_train_batch_size": 4} | NO_STEPS | train,
        methods[0].config if methods else None,
        sizes(12, 20, 5) if methods else None,
    )
    # where the share moves, epochs are cut into equal parts, of which the last may lack a step
    short = made.state.max_steps - made.state.global_step
    assert work.steps == made.state.max_steps
    assert short == 0 or (short == 1 and "schedule" in replay)
    assert work.replayed == pytest.approx(replayed, abs=2)


def test_a_share_of_tokens_takes_more_short_rows():
    replay = Replay(fraction=0.5, by="tokens").config
    train = {"per_device_train_batch_size": 2}
    work = task_work("task", 100, sizes(100, 30, 20), train, replay, sizes(10, 9, 5))
    assert work.replayed == pytest.approx(400, rel=0.02)
    assert work.steps == 250
    assert work.largest.width == 30


def test_the_largest_batch_is_of_the_longest_rows():
    new = Lengths(np.array([4, 5, 6, 90]), np.array([1, 1, 1, 40]))
    work = task_work("task", 4, new, {"per_device_train_batch_size": 2})
    assert (work.largest.rows, work.largest.width, work.largest.learned) == (2, 90, 80)
    assert 26 < work.usual.width < 90, "one batch in two has the long row"
    assert work.tokens == 2 * work.usual.width


def test_packed_rows_are_full():
    work = task_work(
        "task", 100, sizes(100, 32, 8), {"per_device_train_batch_size": 4, "packing": True, "max_length": 64}
    )
    assert work.rows == 50
    assert (work.usual.width, work.usual.learned, work.steps) == (64, 4 * 16, 13)


def test_tokens_are_those_that_are_trained_on(tokenizer, tmp_path):
    """Against the labels that TRL makes."""
    data = rows(12)
    found = measured(data, tokenizer, 64)
    made = trainer([], tmp_path, train_rows=data).train_dataset
    assert found.tokens.tolist() == [len(ids) for ids in made["input_ids"]]
    learned = [sum(label != -100 for label in labels) for labels in made["labels"]]
    assert np.abs(found.learned - np.array(learned)).max() <= 1, "a template may put a line break behind the answer"


def test_long_rows_are_cut(tokenizer):
    data = rows(6)
    whole, cut = measured(data, tokenizer, None), measured(data, tokenizer, 16)
    assert whole.tokens.max() > 16
    assert cut.tokens.tolist() == np.minimum(whole.tokens, 16).tolist()
    assert (cut.learned == np.clip(whole.learned - (whole.tokens - cut.tokens), 0, None)).all()


def test_only_what_the_assistant_says_is_learned(tokenizer):
    talk = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    data = Dataset.from_list([{"messages": talk * 2}])
    assistant, everything = (measured(data, tokenizer, None, on) for on in ("assistant", "all"))
    assert everything.learned == everything.tokens == assistant.tokens
    said = 2 * (len(tokenizer("three")["input_ids"]) + 1)
    assert abs(int(assistant.learned[0]) - said) <= 2


def test_a_long_data_set_is_sampled_evenly(tokenizer, monkeypatch):
    monkeypatch.setattr("retain.workload.SAMPLE", 5)
    data = Dataset.from_list([{"text": "one " * number} for number in range(1, 101)])
    found = measured(data, tokenizer, None)
    assert len(found.tokens) == 5
    assert found.tokens[0] < found.tokens[2] < found.tokens[4]
    stream = measured(data.to_iterable_dataset(), tokenizer, None)
    assert len(stream.tokens) == 5


@pytest.mark.parametrize("number", [20, 100, 4000])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_as_many_rows_are_written_as_replay_asks_for(number, fraction, tmp_path):
    asked: list[int] = []

    class Listening(Run):
        def old_rows(self, model, number, given=None, max_tokens=64):
            asked.append(number)
            return rows(4)

    replay = Replay(fraction=fraction, rows=300, max_tokens=32)
    run = Listening(tmp_path, say=lambda line: None)
    replay.prepare_data(Mixture(Dataset.from_list([{"text": "a"}] * number)), run)
    assert rows_to_write({"replay": replay.config}, False, number) == (asked[0], 32)


def test_nothing_is_written_where_old_rows_are_there():
    replay, ewc = Replay().config, SimpleNamespace(samples=7, importance=None)
    assert rows_to_write({"replay": replay}, True, 100) == (0, 0)
    assert rows_to_write({"ewc": ewc}, True, 100) == (0, 0)
    assert rows_to_write({"ewc": ewc}, False, 100) == (7, 64)
    assert rows_to_write({"ewc": SimpleNamespace(samples=7, importance="runs/other")}, False, 100) == (0, 0)
    assert rows_to_write({}, False, 100) == (0, 0)
    assert rows_to_write({"replay": Replay(source="self").config}, True, 100)[0] > 0


def test_writing_takes_calls_in_batches(tokenizer):
    assert calls_to_write(1, 48) == 32 + 48
    assert calls_to_write(100, 48) == 6 * (32 + 48)
    short, long = (written_lengths(tokenizer, most) for most in (16, 64))
    assert short.tokens[0] < long.tokens[0]
    assert short.learned[0] < 16


def test_questions_are_read_and_answered(tokenizer):
    written = [{"prompt": f"Say {i}", "answers": [str(i)], "max_tokens": 10} for i in range(3)]
    scored = [{"prompt": "Which?", "choices": [" one", " two"], "answer": 0}]
    probes = [*probes_from_rows(written, "says"), *probes_from_rows(scored, "which")]
    found = questions(probes, tokenizer)
    assert found.calls == [(3, 10)]
    alone = questions(probes[1:], tokenizer)
    assert alone.calls == []
    assert alone.read == sum(len(tokenizer(text)["input_ids"]) for text in ("Which?", " one", " two"))
    assert found.read > alone.read
    assert questions([], tokenizer).read == 0


def test_a_divergence_is_read_with_the_answer_that_the_base_writes_once(tokenizer):
    rows = [{"kind": "divergence", "text": "one two three", "id": "t"}]
    rows += [{"kind": "divergence", "prompt": f"Say {i}", "max_tokens": 5, "id": f"p{i}"} for i in range(2)]
    probes = probes_from_rows(rows, "drift")
    text = len(tokenizer("one two three")["input_ids"])
    prompts = sum(len(tokenizer(render(tokenizer, f"Say {i}"))["input_ids"]) for i in range(2))
    look, base = questions(probes, tokenizer), said_by_base(probes, tokenizer)
    assert (look.read, look.calls) == (text + prompts + 2 * 5, [])
    assert (base.read, base.calls) == (look.read + prompts, [(2, 5)])
    others = probes_from_rows([{"prompt": "Say", "answers": ["1"]}], "says")
    assert said_by_base(others, tokenizer).read == 0


def test_looks_of_a_monitor_are_those_of_the_run(shop, tmp_path, tokenizer, monkeypatch):
    """Where nothing moves: how often the anchors are read, and every probe is asked."""
    own = {"every": 2, "probes": [str(shop / "probes.jsonl")], "probes_every": 2, "limit": 4, "anchor_count": 6}
    own |= {"move": 50.0, "max_forgetting": 1.0}
    seen: Counter = Counter()
    read, ask = Looker._read, Looker._ask

    def reading(self, *given, **named):
        seen["anchors"] += 1
        return read(self, *given, **named)

    def asking(self, model, probes):
        seen.update(probe.name for probe in probes)
        return ask(self, model, probes)

    monkeypatch.setattr(Looker, "_read", reading)
    monkeypatch.setattr(Looker, "_ask", asking)
    results, _ = carry_out(shop, tmp_path / "run", monitor=own)
    batch = Batch(1, 1, 1)
    tasks = [TaskWork(s.task, None, 0, s.steps, 1, batch, batch) for s in results.training]
    mine = [probes_from_rows([{"prompt": "Say", "answers": ["1"]}], name) for name in results.tasks]
    anchors, old, *new = watching(ForgettingMonitor(**own), tasks, mine, tokenizer)
    assert anchors[0] == seen["anchors"]
    assert anchors[1].read == sum(len(ids) for ids in tokenizer(anchor_texts(6))["input_ids"])
    assert old[0] == seen["animals"] == seen["prose"]
    assert [times for times, _ in new] == [seen[name] for name in results.tasks]
    alone = ForgettingMonitor(**(own | {"probes": []}))
    assert len(watching(alone, tasks, [[], []], tokenizer)) == 1


def test_a_schedule_is_checked():
    with pytest.raises(ConfigError, match="schedule"):
        task_work(
            "task", 4, sizes(4, 5, 2), {"per_device_train_batch_size": 2},
            Replay(schedule="custom", expression="2 * t").config, sizes(4, 5, 2),
        )  # fmt: skip
