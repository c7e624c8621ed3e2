"""Replay: the share asked for at every step, each row with its own mask, from every source of old rows."""

import json

import numpy as np
import pytest
from training_kit import rows, train, trainer

from retain.data.buffer import Buffer
from retain.data.mixture import MixtureSampler
from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.replay import Replay


def flat(made, key):
    return [value for micro in made.seen for value in micro[key]]


def answers(dataset):
    return {json.dumps(row["completion"][0]["content"]) + row["prompt"][0]["content"] for row in dataset}


def unpadded(made, source):
    """Token ids and labels of the rows of one origin, padding removed."""
    pad = made.processing_class.pad_token_id
    found = []
    for micro in made.seen:
        for ids, labels, origin in zip(micro["ids"], micro["labels"], micro["source"]):
            if origin == source:
                end = len(ids)
                while ids[end - 1] == pad and labels[end - 1] == -100:
                    end -= 1
                found.append((tuple(ids[:end]), tuple(labels[:end])))
    return found


def tokenised(made, dataset):
    return {
        (tuple(row["input_ids"]), tuple(row["labels"]))
        for row in made._tokenised(dataset).select_columns(["input_ids", "labels"])
    }


@pytest.mark.parametrize("fraction", [0.25, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_step_holds_the_share_of_rows(fraction, accumulate, tmp_path):
    settings = {"batch": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    # as many steps as full windows: the last window of an epoch is what is left over
    made = train([Replay(fraction=fraction)], tmp_path, train_rows=rows(32), steps=5, **settings)
    source = np.array(flat(made, "source"))[: 5 * 8].reshape(-1, 8)
    assert set((source[:-1] > 0).sum(1)) == {round(8 * fraction)}
    new, replayed = made.rows_seen()
    assert (new, replayed) == (int((source == 0).sum()), int((source > 0).sum()))


def test_every_new_row_comes_once_in_an_epoch(tmp_path):
    made = train([Replay(fraction=0.5)], tmp_path, steps=-1, num_train_epochs=1)
    assert sorted(unpadded(made, 0)) == sorted(tokenised(made, rows(16)))
    replayed = unpadded(made, 1)
    assert len(replayed) == 16
    assert set(replayed) <= tokenised(made, rows(12, 100))
    assert max(replayed.count(row) for row in replayed) == 2, "12 rows for 16 places: nothing three times"


def test_each_row_carries_its_own_mask(tmp_path):
    made = train([Replay(fraction=0.5)], tmp_path)
    for source, dataset in ((0, rows(16)), (1, rows(12, 100))):
        wanted = tokenised(made, dataset)
        seen = unpadded(made, source)
        assert seen
        assert set(seen) <= wanted
        assert all(-100 in labels and any(label != -100 for label in labels) for _, labels in seen)


def test_the_share_in_tokens(tmp_path):
    long = rows(16).map(lambda row: {"completion": [{"role": "assistant", "content": "one two three four " * 5}]})
    tokens = {}
    for by in ("rows", "tokens"):
        made = train([Replay(fraction=0.4, by=by)], tmp_path / by, train_rows=long, steps=-1, num_train_epochs=2)
        source, counts = np.array(flat(made, "source")), np.array(flat(made, "tokens"))
        tokens[by] = counts[source > 0].sum() / counts.sum()
    assert tokens["tokens"] == pytest.approx(0.4, abs=0.02)
    assert tokens["rows"] < 0.3, "short replay rows must weigh less when rows are counted"


def scheduled(folder, epochs, **settings):
    return train(
        [Replay(**settings)], folder, train_rows=rows(160), steps=-1, num_train_epochs=epochs, batch=8
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"fraction": 0.5, "schedule": "linear", "end": 0.0}, lambda t: 0.5 * (1 - t)),
        ({"fraction": 0.1, "schedule": "rising", "end": 0.5}, lambda t: 0.1 + 0.4 * t),
        ({"schedule": "custom", "expression": "0.6*t"}, lambda t: 0.6 * t),
    ],
)
def test_schedules_move_the_share(settings, share, tmp_path):
    made = scheduled(tmp_path, 1, **settings)
    source = np.array(flat(made, "source"))
    place = np.cumsum(source == 0) / (source == 0).sum()
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        here = (place > low) & (place <= high)
        odds = np.mean([share(t) / (1 - share(t)) for t in np.linspace(low, high, 200)])
        assert (source[here] > 0).sum() / (source[here] == 0).sum() == pytest.approx(odds, abs=0.06)


@pytest.mark.parametrize(
    "ends",
    [
        (0.6, 0.0),
        (0.0, 0.6),
    ],
)
def test_a_schedule_over_several_epochs_shows_every_new_row_in_each(ends, tmp_path):
    made = scheduled(tmp_path, 3, schedule="custom", expression=f"{ends[0]} + ({ends[1]} - {ends[0]}) * t")
    assert flat(made, "source").count(0) == 3 * 160


def test_the_order_does_not_depend_on_how_many_processes_share_it():
    """Each optimizer step takes the same rows, dealt out by accelerate over 1, 2 or 4 processes."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    def steps(ranks, batch, accumulate):
        assert ranks * batch * accumulate == 8
        sampler = MixtureSampler(np.ones(48), np.ones(10), lambda t: 0.25, "rows", 8, epochs=1, seed=3)
        shares = [
            list(BatchSamplerShard(BatchSampler(sampler, batch, False), ranks, rank, even_batches=False))
            for rank in range(ranks)
        ]
        return [
            sorted(row for share in shares for part in share[first : first + accumulate] for row in part)
            for first in range(0, len(shares[0]), accumulate)
        ]

    one = steps(1, 8, 1)
    assert len(one) == 8
    assert one == steps(2, 4, 1) == steps(4, 2, 1) == steps(2, 2, 2) == steps(1, 2, 4)
    assert all(sum(row >= 48 for row in step) == 2 for step in one)


def test_epochs_differ_and_seeds_differ():
    def plan(seed, epoch):
        return MixtureSampler(np.ones(40), np.ones(9), lambda t: 0.2, "rows", 8, 2, seed).plan(epoch).tolist()

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)
    sampler = MixtureSampler(np.ones(40), np.ones(9), lambda t: 0.2, "rows", 8, 2, 0)
    assert list(sampler) == plan(0, 0)
    sampler.set_epoch(1)
    assert list(sampler) == plan(0, 1)
    assert len(sampler) == len(plan(0, 1))


def test_a_model_without_old_rows_writes_its_own(tmp_path, monkeypatch):
    from retain.models import generation

    calls = []

    def generate(model, tokenizer, prompts, max_new_tokens, temperature, top_p, seed):
        calls.append(seed)
        said = []
        for i, prompt in enumerate(prompts):
            word = "".join(chr(97 + int(c)) for c in f"{1000 * len(calls) + 37 * i}")
            text = f" the ship is {word}." if prompt.endswith("assistant\n") else f" bird {word} {word[::-1]} x{word}?"
            said.append(generation.Generated(text, 9, True))
        return said

    monkeypatch.setattr(generation, "generate", generate)
    run = Run(tmp_path / "first", shared=tmp_path, say=(said := []).append)
    made = train([Replay(fraction=0.5, rows=6)], tmp_path / "first", old=None, run=run)
    written = calls.copy()
    assert len(set(written)) == len(written) >= 2
    assert any("rows itself" in line for line in said)
    assert (tmp_path / "buffer" / "self.parquet").is_file()
    texts = {made.processing_class.decode(ids) for ids, _ in unpadded(made, 1)}
    assert texts
    assert all("ship" in text and "bird" in text for text in texts)
    again = Run(tmp_path / "second", task="second", task_index=2, shared=tmp_path, say=lambda line: None)
    train([Replay(fraction=0.5, rows=6)], tmp_path / "second", old=None, run=again)
    assert calls == written, "they are written once per run"


def test_the_tiny_model_itself_writes(tmp_path):
    """Nothing replaced: generation, filters, file and training in one piece."""
    run = Run(tmp_path, say=(said := []).append)
    made = train([Replay(fraction=0.5, rows=2)], tmp_path, old=None, run=run, max_length=256, steps=2)
    assert sum(flat(made, "source")) > 0
    assert any("itself" in line for line in said)


def test_the_buffer_fills_at_the_end_of_a_task_and_feeds_the_next(tmp_path):
    def run(name, index, data):
        return Run(tmp_path / name, task=name, task_index=index, shared=tmp_path, new_rows=data, say=lambda line: None)

    method = {"fraction": 0.5, "source": "none", "buffer": 10}
    first_rows, second_rows = rows(16), rows(16, 500)
    first = train([Replay(**method)], tmp_path / "a", train_rows=first_rows, old=None, run=run("a", 1, first_rows))
    assert sum(flat(first, "source")) == 0
    kept = Buffer(tmp_path / "buffer" / "tasks", size=10)
    assert len(kept) == 10
    assert kept.counts("source") == {"a": 10}
    assert answers(kept.rows()) <= answers(first_rows)
    first.release()
    second = train(
        [Replay(**method)], tmp_path / "b", first.model, train_rows=second_rows, old=None,
        run=run("b", 2, second_rows),
    )  # fmt: skip
    replayed = unpadded(second, 1)
    assert replayed
    assert set(replayed) <= tokenised(second, kept.rows().select_columns(["prompt", "completion"]))
    assert not set(replayed) & tokenised(second, second_rows)
    full = Buffer(tmp_path / "buffer" / "tasks", size=10).counts("source")
    assert sum(full.values()) == 10
    assert set(full) == {"a", "b"}


def test_a_task_is_added_to_the_buffer_once(tmp_path):
    run = Run(tmp_path / "a", task="a", shared=tmp_path, new_rows=rows(8), say=lambda line: None)
    made = train([Replay(fraction=0.25, source="none", buffer=100)], tmp_path / "a", old=None, run=run)
    made.stack.on_task_end(made.model, run)
    assert Buffer(tmp_path / "buffer" / "tasks", size=100).counts("source") == {"a": 8}


def test_settings_without_effect_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="needs 'old'"):
        trainer([Replay(source="old")], tmp_path, old=None)
    run = Run(tmp_path, task_index=2, say=lambda line: None)
    with pytest.raises(ConfigError, match="the buffer is empty"):
        train([Replay(source="none")], tmp_path, old=None, run=run)
    with pytest.raises(ConfigError, match="fraction"):
        Replay(fraction=1.0)
    for settings in ({"end": 0.2}, {"expression": "t"}):
        with pytest.raises(ConfigError, match="schedule"):
            train([Replay(**settings)], tmp_path)
