"""Replay: the share asked for at every step, each row with its own mask, from every source of old rows."""

import json

import numpy as np
import pytest
from training_kit import Killed, StopAt, rows, same_bits, stored, train, trainer

from retain.config import parse
from retain.data.buffer import Buffer
from retain.data.mixture import MixtureSampler
from retain.data.replay_sources import SHARED
from retain.errors import ConfigError, DataError
from retain.methods import build, gathering
from retain.methods.agem import AGEM
from retain.methods.base import Stack
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
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        here = source[round(low * len(source)) : round(high * len(source))]
        assert (here > 0).mean() == pytest.approx(np.mean([share(t) for t in np.linspace(low, high, 200)]), abs=0.05)
    assert (source > 0).mean() == pytest.approx(np.mean([share(t) for t in np.linspace(0, 1, 200)]), abs=0.01)


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
    kept = Buffer(tmp_path / "buffer" / "tasks-10", size=10)
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
    full = Buffer(tmp_path / "buffer" / "tasks-10", size=10).counts("source")
    assert sum(full.values()) == 10
    assert set(full) == {"a", "b"}


def test_a_task_is_added_to_the_buffer_once(tmp_path):
    run = Run(tmp_path / "a", task="a", shared=tmp_path, new_rows=rows(8), say=lambda line: None)
    made = train([Replay(fraction=0.25, source="none", buffer=100)], tmp_path / "a", old=None, run=run)
    made.stack.on_task_end(made.model, run)
    assert Buffer(tmp_path / "buffer" / "tasks-100", size=100).counts("source") == {"a": 8}


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


# -- blocks, schedules and defaults ----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replay_in_blocks_of_optimizer_steps(accumulate, tmp_path):
    settings = {"batch": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    method = Replay(fraction=0.25, every=4)
    made = train([method], tmp_path, train_rows=rows(96), steps=8, **settings)
    source = np.array(flat(made, "source")).reshape(-1, 8)
    assert (source > 0).sum(1).tolist() == [0, 0, 0, 8] * 2
    assert made.rows_seen() == (48, 16)


@pytest.mark.parametrize("settings", [{"every": 3}, {"every": 3, "spread": 0.5}, {"schedule": "annealed", "part": 0.6}])
def test_the_position_survives_a_resume(settings, tmp_path):
    saving = {"steps": 8, "save_strategy": "steps", "save_steps": 2, "train_rows": rows(20)}
    method = {"fraction": 0.3} | settings
    straight = train([Replay(**method)], tmp_path / "straight", **saving)
    with pytest.raises(Killed):
        train([Replay(**method)], tmp_path / "killed", callbacks=[StopAt(5)], **saving)
    again = trainer([Replay(**method)], tmp_path / "killed", **saving)
    again.train(resume_from_checkpoint=True)
    assert again.seen == straight.seen[-4:]
    assert same_bits(stored(again.model), stored(straight.model))
    assert again.replayed() == straight.replayed()


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, (0.1, 0.1)),
        ({"sources": ["old", "self"]}, (0.15, 0.15)),
        ({"schedule": "rising"}, (0.15, 0.30)),
        ({"schedule": "linear"}, (0.2, 0.04)),
        ({"schedule": "cosine"}, (0.3, 0.1)),
        ({"schedule": "warmup"}, (0.0, 0.1)),
        ({"schedule": "annealed"}, (0.0, 0.5)),
        ({"schedule": "rising", "fraction": 0.0, "end": 0.2}, (0.0, 0.2)),
        ({"schedule": "linear", "fraction": 0.5}, (0.5, 0.1)),
    ],
)
def test_a_fraction_that_is_not_given_is_the_schedules_own(settings, ends):
    (method,) = build(parse({"tasks": ["a.jsonl"], "methods": [{"replay": settings}]}).methods)
    assert method.active
    assert [method.config.share(t) for t in (0.0, 1.0)] == pytest.approx(ends)


def test_a_fraction_of_nothing_is_off():
    assert not Replay(fraction=0).active
    assert not Replay(fraction=0, schedule="linear").active
    assert Replay(fraction=0, schedule="rising").active, "it ends above 0 of itself"


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"fraction": 0.1, "schedule": "custom", "expression": "t/2"}, "takes no start"),
        ({"schedule": "custom"}, "expression"),
        ({"part": 0.5}, "part"),
        ({"schedule": "annealed", "fraction": 0.4}, "Raise `part` above 0.4"),
        ({"spread": 0.5}, "set `every`"),
        ({"temperature": 2}, "two or more `sources`"),
        ({"temperature": 2, "sources": ["self"]}, "two or more `sources`"),
        ({"source": "self", "sources": ["old"]}, "among the `sources`"),
        ({"buffer": 0, "sources": ["old", "tasks"]}, "keep rows"),
        ({"sources": ["old", "old"]}, "listed twice"),
        ({"sources": ["old", "on_policy"]}, "set `source: on_policy`"),
        ({"sources": ["old", {"data": "tasks", "weight": 2}], "priority": "length"}, "draw by worth"),
        ({"sources": ["old"], "endpoint": {"url": "http://x/v1", "model": "m"}}, "without effect"),
        ({"sources": [{"data": "self", "streaming": True}]}, "no effect on 'self'"),
        ({"sources": [{"data": "a.jsonl", "wieght": 2}]}, r"sources\.0: unknown 'wieght'. Did you mean 'weight'"),
        ({"sources": [{"data": "a.jsonl", "weight": 0}]}, r"sources\.0\.weight"),
        ({"sources": [{"weight": 2}]}, r"sources\.0\.data"),
        ({"every": 1}, "every"),
        ({"source": "on_policy", "on_policy": {"check": "contians"}}, "Did you mean 'contains'"),
        ({"source": "on_policy", "on_policy": {"check": "nowhere.at_all:x"}}, "cannot be loaded"),
        ({"source": "self", "endpoint": {"url": "localhost:8000", "model": "m"}}, r"endpoint\.url"),
        ({"exponent": 0.5}, "does nothing with `priority: none`"),
        ({"priority": "custom", "function": "nowhere.at_all:x"}, "cannot be loaded"),
        ({"priority": "loss", "by": "tokens"}, r"methods\.replay\.by"),
        ({"rows": 9, "sources": ["a.jsonl", "tasks"]}, "rows: 9 has no effect here; add `old`"),
        ({"rows": 9, "sources": [{"data": "old", "limit": 3}]}, "without a `limit`"),
        ({"rows": 9, "source": "none"}, "another `source`"),
        ({"buffer": 9, "sources": ["old"]}, "add `tasks`"),
        ({"policy": "balanced", "buffer": 0}, "keep rows of earlier tasks"),
        ({"policy": "balanced", "sources": ["old"]}, "keep rows of earlier tasks"),
        ({"max_tokens": 32, "source": "old"}, "let the model write"),
        ({"max_tokens": 32, "source": "none"}, "let the model write"),
        ({"max_tokens": 32, "sources": ["old", "tasks"]}, "let the model write"),
        ({"source": "none", "buffer": 0}, "keep rows"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_anything_runs(settings, part):
    with pytest.raises(ConfigError, match=part) as caught:
        Replay(**settings).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 9, "sources": ["self", "tasks"], "max_tokens": 32, "buffer": 9, "policy": "balanced"},
        {"rows": 9, "sources": [{"data": "old", "limit": 3}, "self"]},
        {"sources": ["old"], "buffer": 0},
        {"rows": 9, "max_tokens": 32, "buffer": 0},
        {"source": "on_policy", "rows": 9, "max_tokens": 32, "buffer": 0},
    ],
)
def test_settings_with_an_effect_are_none_of_these(settings):
    Replay(**settings).check()


def test_without_a_buffer_answers_on_policy_need_old_prompts(tmp_path):
    with pytest.raises(ConfigError, match="needs 'old'"):
        trainer([Replay(source="on_policy", buffer=0)], tmp_path, old=None)


@pytest.mark.parametrize("settings", [{"source": "old", "rows": 5}, {"sources": [{"data": "old", "limit": 5}]}])
def test_a_limit_on_old_rows_is_drawn_with_the_seed(settings, tmp_path):
    def taken(seed):
        run = Run(tmp_path, seed=seed, old=rows(40, 200), say=lambda line: None)
        (part,) = gathering.parts(Replay(**settings).config, run, 16, lambda: None)
        return part.rows["completion"], part.rows["prompt"]

    first = rows(40, 200).select(range(5))
    assert len(taken(0)[1]) == 5
    assert taken(0) == taken(0)
    assert taken(0) != taken(1)
    assert taken(0)[1] != first["prompt"]


def test_a_buffer_of_another_size_than_that_of_agem_has_its_own_folder(tmp_path):
    both = [Replay(source="none", buffer=5), AGEM(rows=4)]
    run = Run(tmp_path / "a", task="a", shared=tmp_path, new_rows=rows(8), say=lambda line: None)
    train(both, tmp_path / "a", steps=1, run=run)
    kept = {name: Buffer(tmp_path / "buffer" / name, size=size) for name, size in (("tasks-5", 5), ("tasks", 10_000))}
    assert {name: len(buffer) for name, buffer in kept.items()} == {"tasks-5": 5, "tasks": 8}
    assert Replay().config.buffer == AGEM().config.buffer == SHARED


# -- several sources -------------------------------------------------------------------------------------


def written(path, count, offset):
    lines = [{"prompt": f"question {i + offset}", "response": "ship sail"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_sources_by_weight_are_counted_said_and_logged(tmp_path):
    general, other = written(tmp_path / "general.jsonl", 9, 1000), written(tmp_path / "other.jsonl", 4, 2000)
    run = Run(tmp_path / "run", say=(said := []).append)
    sources = [
        {"data": general, "weight": 4},
        {"data": other, "weight": 2, "name": "rest"},
        {"data": "old", "weight": 2},
    ]
    made = train(
        [Replay(fraction=0.5, sources=sources)], tmp_path / "run", train_rows=rows(64), steps=8, batch=8, run=run
    )
    assert run.replay_sources == ("general", "rest", "old")
    assert made.replayed() == {"general": 16, "rest": 8, "old": 8}
    assert made.rows_seen() == (32, 32)
    assert np.bincount(flat(made, "source")).tolist() == [32, 16, 8, 8]
    assert "replay: general 9, rest 4, old 12 rows; share 50.0% of rows." in said
    assert said[-1] == "replay: 32 of 64 rows shown were replayed (50.0%): general 16, rest 8, old 8."
    logs = [line for line in made.state.log_history if "loss" in line]
    for name, share in {"general": 0.25, "rest": 0.125, "old": 0.125}.items():
        assert np.mean([line[f"replay/{name}"] for line in logs]) == pytest.approx(share)
    decode = made.processing_class.decode
    for micro in made.seen:  # the number of a row's source is that of its text
        for ids, source in zip(micro["ids"], micro["source"]):
            text = decode(ids).split("question")[1]
            number = int("".join(c for c in text.split("<")[0] if c.isdigit()))
            assert source == (0 if number < 100 else 3 if number < 1000 else 1 if number < 2000 else 2)


def test_rows_drawn_by_worth_come_from_all_sources_and_are_counted_together(tmp_path):
    paths = [written(tmp_path / f"{n}.jsonl", 8, 1000 * n) for n in (1, 2)]
    method = Replay(fraction=0.5, sources=paths, priority="length", every=2)
    made = train([method], tmp_path / "run", train_rows=rows(80), steps=10, batch=4)
    assert made.replayed() == {"replay": 20}
    assert set(flat(made, "source")) == {0, 1, 2}
    assert [sum(source > 0 for source in micro["source"]) for micro in made.seen] == [0, 4] * 5


def test_a_temperature_evens_sources_out(tmp_path):
    paths = [written(tmp_path / f"{n}.jsonl", size, 1000 * n) for n, size in ((1, 27), (2, 3))]
    found = {}
    for temperature in (1, 1e6):
        method = Replay(fraction=0.5, sources=paths, temperature=temperature)
        made = train([method], tmp_path / f"{temperature}", train_rows=rows(80), steps=10, batch=4)
        found[temperature] = list(made.replayed().values())
    assert found == {1: [18, 2], 1e6: [10, 10]}


def test_earlier_tasks_are_a_source_among_others(tmp_path):
    def run(name, index, data):
        return Run(tmp_path / name, task=name, task_index=index, shared=tmp_path, new_rows=data, say=said.append)

    said: list[str] = []
    with_tasks = {"fraction": 0.5, "sources": [{"data": "old", "weight": 1}, {"data": "tasks", "weight": 3}]}
    first = train([Replay(**with_tasks)], tmp_path / "a", train_rows=rows(16), run=run("a", 1, rows(16)))
    assert first.replayed() == {"old": 8}
    first.release()
    second = train(
        [Replay(**with_tasks)], tmp_path / "b", first.model, train_rows=rows(16, 500), run=run("b", 2, rows(16, 500))
    )
    assert second.replayed() == {"old": 2, "tasks": 6}
    assert set(unpadded(second, 2)) <= tokenised(second, rows(16))
    second.release()
    third = train([Replay(fraction=0.5, sources=["old"])], tmp_path / "c", second.model, run=run("c", 3, rows(16, 900)))
    assert third.replayed() == {"old": 8}
    assert any("rows of earlier tasks are not replayed" in line for line in said)
    assert Buffer(tmp_path / "buffer" / "tasks").counts("source") == {"a": 16, "b": 16}, "kept where it is replayed"


def test_needs_and_files_of_sources_are_checked_before_training(tmp_path):
    with pytest.raises(ConfigError, match="needs 'old'"):
        trainer([Replay(sources=["old", "tasks"])], tmp_path, old=None)
    with pytest.raises(DataError, match="no such file"):
        Stack([Replay(sources=["self", str(tmp_path / "gone.jsonl")])]).check_inputs(None)
