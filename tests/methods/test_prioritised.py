"""Replay by priority in training: measured, drawn, weighed, kept, resumed; plain replay knows nothing of it."""

import sys

import numpy as np
import pytest
import torch
from training_kit import Killed, StopAt, distance, other_rows, rows, same_bits, stored, train, trainer

from retain.data.judged import JudgedBuffer
from retain.data.references import References
from retain.errors import ConfigError
from retain.functional.priorities import probabilities
from retain.methods.agem import AGEM
from retain.methods.context import Run
from retain.methods.replay import Replay
from retain.models.row_scores import row_gradient_norms, row_keys, row_losses

BASE = {"fraction": 0.5, "measure_every": 2, "measure_rows": 6}


def replay(**settings):
    settings = {"priority": "forgetting"} | BASE | settings
    if settings["priority"] in ("length", "terms"):
        settings = {name: value for name, value in settings.items() if not name.startswith("measure_")}
    return Replay(**settings)


def losses_of(made):
    return row_losses(made.model.eval(), made.run.batches(made.stack.methods[0]._rows, 4))


def watch(monkeypatch):
    """What each renewal was given: (step, rows, values)."""
    from retain.data.priorities import Priorities

    found, inner = [], Priorities.renew

    def renew(self, step, chosen, values):
        found.append((step, chosen.copy(), values.copy()))
        inner(self, step, chosen, values)

    monkeypatch.setattr(Priorities, "renew", renew)
    return found


def test_priorities_are_the_rise_of_the_loss(tmp_path, monkeypatch):
    renewals = watch(monkeypatch)
    made = trainer([replay(measure_rows=12)], tmp_path, steps=6, batch=8)
    before = {}

    def start(model, run, inner=made.stack.methods[0].on_task_start):
        before["losses"] = row_losses(model, run.batches(made.stack.methods[0]._rows, 4))
        inner(model, run)

    monkeypatch.setattr(made.stack.methods[0], "on_task_start", start)
    made.train()
    assert [step for step, _, _ in renewals] == [1, 3, 5]
    _, chosen, values = renewals[-1]
    assert chosen.tolist() == list(range(12))
    # measured after step 6, when the weights are those at the end
    assert values == pytest.approx(losses_of(made) - before["losses"], abs=1e-5)
    assert np.abs(values).max() > 0.05
    assert any("replay/priority" in line for line in made.state.log_history)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_other_measured_priorities(tmp_path, monkeypatch, kind):
    renewals = watch(monkeypatch)
    made = train([replay(priority=kind, measure_rows=12)], tmp_path, steps=4, batch=8)
    measure, size = (row_losses, 4) if kind == "loss" else (row_gradient_norms, 1)
    expected = measure(made.model.eval(), made.run.batches(made.stack.methods[0]._rows, size))
    assert renewals[-1][2] == pytest.approx(expected, rel=1e-4)


def test_the_priority_of_a_replayed_row_changes_after_its_loss_changes(tmp_path, monkeypatch):
    """A row that is trained on loses its priority; rows that nobody measured keep theirs."""
    renewals = watch(monkeypatch)
    made = train([replay(priority="loss", measure_rows=6)], tmp_path, steps=4, batch=8, old=other_rows(12))
    method = made.stack.methods[0]
    (_, first, _), (_, second, _) = renewals
    priorities = method.priorities
    touched = np.union1d(first, second)
    assert 6 < len(touched) <= 12
    now = losses_of(made)
    for row, value in zip(second, renewals[1][2]):
        assert value == pytest.approx(now[row], rel=1e-4)
        assert priorities.next[row] == value
    assert (priorities.next[second] < priorities.current[second]).all(), "rows that are trained on are learned"
    untouched = np.setdiff1d(np.arange(12), second)
    assert np.array_equal(priorities.next[untouched], priorities.current[untouched])


def test_rows_are_drawn_by_priority(tmp_path):
    """One row is worth a hundred times the others: with exponent 1 it fills the places that chance gives it."""
    old = other_rows(12).map(
        lambda row, i: {"completion": [{"role": "assistant", "content": "sea " * (100 if i == 4 else 1)}]},
        with_indices=True,
    )
    settings = {"priority": "length", "exponent": 1.0, "fraction": 0.5}
    made = train([Replay(**settings)], tmp_path, steps=12, batch=8, old=old, max_length=256)
    lengths = [tokens for micro in made.seen for tokens, s in zip(micro["tokens"], micro["source"]) if s]
    longest = max(lengths)
    method = made.stack.methods[0]
    share = float(method.priorities.chances(0).max())
    assert 0.6 < share < 0.8
    assert np.mean([length == longest for length in lengths]) == pytest.approx(share, abs=0.08)
    plain = train([Replay(fraction=0.5)], tmp_path / "plain", steps=12, batch=8, old=old, max_length=256)
    lengths = [tokens for micro in plain.seen for tokens, s in zip(micro["tokens"], micro["source"]) if s]
    assert np.mean([length == longest for length in lengths]) < 0.2


def test_as_many_rows_as_planned(tmp_path):
    plain = train([Replay(fraction=0.25)], tmp_path / "plain", steps=5, batch=8)
    late = train([replay(fraction=0.25)], tmp_path / "late", steps=5, batch=8)
    assert [micro["source"] for micro in plain.seen] == [micro["source"] for micro in late.seen]
    assert plain.rows_seen() == late.rows_seen()
    new = [[ids for ids, s in zip(micro["ids"], micro["source"]) if not s] for micro in late.seen]
    strip = lambda batch: [[i for i in ids if i] for ids in batch]  # noqa: E731
    assert [strip(b) for b in new] == [
        strip([ids for ids, s in zip(m["ids"], m["source"]) if not s]) for m in plain.seen
    ]


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
def test_a_killed_run_goes_on_with_the_same_rows_and_bits(tmp_path, stop):
    saving = {"steps": 9, "batch": 4, "save_strategy": "steps", "save_steps": 1, "train_rows": rows(10)}
    method = {"correction": 0.4, "measure_every": 3}
    straight = train([replay(**method)], tmp_path / "straight", **saving)
    with pytest.raises(Killed):
        train([replay(**method)], tmp_path / "killed", callbacks=[StopAt(stop)], **saving)
    again = trainer([replay(**method)], tmp_path / "killed", **saving)
    again.train(resume_from_checkpoint=True)
    assert again.seen == straight.seen[-len(again.seen) :]
    assert len(again.seen) < 9
    assert same_bits(stored(again.model), stored(straight.model))
    for name, value in straight.stack.state_dict().items():
        assert torch.equal(value, again.stack.state_dict()[name]), name


@pytest.mark.parametrize("accumulate", [1, 4])
def test_workers_and_accumulation_change_nothing(tmp_path, accumulate):
    settings = {"steps": 8, "batch": 8 // accumulate, "gradient_accumulation_steps": accumulate, "adam_epsilon": 1e-4}
    from tiny import tiny_model, tiny_tokenizer

    def run(name, **more):
        model = tiny_model(tiny_tokenizer()).double()
        return train([replay(measure_every=4, correction=0.5)], tmp_path / name, model, **(settings | more))

    one, other = run("alone"), run("workers", dataloader_num_workers=1)
    assert one.seen == other.seen
    assert same_bits(stored(one.model), stored(other.model))
    whole = run("whole", batch=8, gradient_accumulation_steps=1)
    assert [t for m in whole.seen for t in m["tokens"]] == [t for m in one.seen for t in m["tokens"]]
    assert distance(stored(whole.model), stored(one.model)) < 2e-6


def test_a_loader_that_reads_too_far_ahead_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="reads ahead further"):
        train([replay(measure_every=1)], tmp_path, steps=8, dataloader_num_workers=1, dataloader_prefetch_factor=6)


def test_replayed_tokens_are_weighed(tmp_path, monkeypatch):
    """Each replayed row by its own draw, new rows by 1; b rises from its start to 1."""
    found = []
    method = replay(priority="length", correction=0.4, exponent=1.0)
    inner = type(method).token_weights

    def token_weights(self, tokens, run):
        weights = inner(self, tokens, run)
        found.append((run.step, tokens.batch.number.clone(), tokens.rows.clone(), weights))
        return weights

    monkeypatch.setattr(type(method), "token_weights", token_weights)
    made = train([method], tmp_path, steps=5, batch=8)
    lengths = np.array([sum(label != -100 for label in labels) for labels in method._rows["labels"]])
    chances = probabilities(lengths, 1.0, 0.01)
    assert len(found) == 5
    for step, number, owner, weights in found:
        b = 0.4 + 0.6 * step / 4
        raw = (1 / (12 * chances)) ** b
        expected = [1.0 if number[row] < 0 else (raw / raw.max())[number[row]] for row in owner]
        assert weights.tolist() == pytest.approx(expected, rel=1e-5)
        assert len(set(np.round(expected, 6))) > 2
    assert made.state.global_step == 5


def test_without_correction_nothing_is_weighed(tmp_path, monkeypatch):
    from retain.training.trainer import ContinualTrainer

    def never(*arguments):
        raise AssertionError("the main loss is made again")

    monkeypatch.setattr(ContinualTrainer, "_weighted", never)
    train([replay()], tmp_path / "late", steps=2)
    train([Replay(fraction=0.5)], tmp_path / "plain", steps=2)


def test_full_correction_follows_the_uniform_objective(tmp_path):
    """Expected gradient over many steps, by the weights that the draw itself would give: exact for every row."""
    made = train([replay(priority="length", exponent=1.0, correction=1.0)], tmp_path, steps=1)
    priorities = made.stack.methods[0].priorities
    product = priorities.chances(0) * priorities.weights(0, 1.0, 0.0)
    assert product == pytest.approx(np.full(12, product[0]), rel=1e-12)


def two_tasks(tmp_path, first_settings, second_settings=None, first=24, second=24):
    def run(name, index, data):
        return Run(tmp_path / name, task=name, task_index=index, shared=tmp_path, new_rows=data, say=lambda line: None)

    a, b = rows(first), rows(second, 500)
    one = train([Replay(**first_settings)], tmp_path / "a", train_rows=a, old=None, run=run("a", 1, a))
    one.release()
    method = Replay(**(second_settings or first_settings))
    return one, train([method], tmp_path / "b", one.model, train_rows=b, old=None, run=run("b", 2, b), steps=6)


def test_references_are_the_losses_when_rows_were_stored(tmp_path, monkeypatch):
    settings = BASE | {"priority": "forgetting", "source": "none", "buffer": 10}
    kept = {}
    save = References.save

    def remember(self, losses):
        kept.setdefault("first", dict(losses))
        save(self, losses)

    monkeypatch.setattr(References, "save", remember)
    renewals = watch(monkeypatch)
    _, made = two_tasks(tmp_path, settings)
    method = made.stack.methods[0]
    assert len(kept["first"]) == len(method._rows) == 10
    assert method._reference == pytest.approx([kept["first"][key] for key in row_keys(method._rows)])
    step, chosen, values = renewals[-1]
    assert step == 5
    assert values == pytest.approx(losses_of(made)[chosen] - method._reference[chosen], abs=1e-5)
    # rows of both tasks have one now, and those of the first are the same as before
    last = References(tmp_path / "buffer").load()
    assert {key: last[key] for key in kept["first"]} == kept["first"]
    assert len(last) > 10


def test_a_full_buffer_gives_away_what_is_worth_least(tmp_path):
    settings = {"fraction": 0.5, "priority": "length", "policy": "priority", "source": "none", "buffer": 6}
    two_tasks(tmp_path, settings)
    buffer = JudgedBuffer(tmp_path / "buffer" / "tasks-priority", 6)
    every = [*rows(24), *rows(24, 500)]
    words = sorted((len(row["completion"][0]["content"].split()) for row in every), reverse=True)
    kept = [len(row["completion"][0]["content"].split()) for row in buffer.rows()]
    assert sorted(kept, reverse=True) == words[:6]
    assert len(buffer) == 6
    assert set(buffer.counts()) == {"a", "b"}, "rows of equal value are drawn"


def test_stored_rows_get_the_priorities_that_were_measured(tmp_path):
    settings = BASE | {"priority": "loss", "policy": "priority", "source": "none", "buffer": 200, "measure_rows": 24}
    _, made = two_tasks(tmp_path, settings)
    buffer = JudgedBuffer(tmp_path / "buffer" / "tasks-priority", 200)
    stored = buffer.rows()
    assert len(stored) == 48
    now = row_losses(made.model.eval(), made.run.batches(stored.select_columns(["prompt", "completion"]), 4))
    assert np.array(stored["value"]) == pytest.approx(now, abs=1e-4)


def test_forgotten_rows_are_kept_and_new_ones_stand_in_the_middle(tmp_path):
    settings = BASE | {"priority": "forgetting", "policy": "priority", "source": "none", "buffer": 12}
    two_tasks(tmp_path, settings | {"measure_rows": 12})
    before = JudgedBuffer(tmp_path / "buffer" / "tasks-priority", 12).before("b").rows()
    after = JudgedBuffer(tmp_path / "buffer" / "tasks-priority", 12).rows()
    old = [row for row in after if row["task"] == "a"]
    assert 0 < len(old) < 12
    values = np.array(before["value"])
    assert min(row["value"] for row in old) >= values.mean()
    assert np.isnan([row["value"] for row in after if row["task"] == "b"]).all()


@pytest.mark.parametrize("policy", ["reservoir", "priority", "diversity"])
def test_a_run_killed_after_the_buffer_was_filled_replays_what_it_replayed(tmp_path, policy):
    """Though stored rows had to make room for those of the task."""
    settings = {"fraction": 0.5, "priority": "length", "policy": policy, "source": "none", "buffer": 6}
    _, made = two_tasks(tmp_path, settings)
    data = rows(24, 500)
    run = Run(tmp_path / "b", task="b", task_index=2, shared=tmp_path, new_rows=data, say=lambda line: None)
    assert "b" in Replay(**settings).buffer_of(run).counts("source")
    again = trainer([Replay(**settings)], tmp_path / "again", train_rows=data, old=None, run=run)
    again._mix()
    assert len(again._mixture.replay) == 6
    assert list(again._mixture.replay["input_ids"]) == list(made._mixture.replay["input_ids"])


def test_diversity_in_a_run(tmp_path):
    two_tasks(tmp_path, {"fraction": 0.25, "policy": "diversity", "clusters": 3, "source": "none", "buffer": 9})
    buffer = JudgedBuffer(tmp_path / "buffer" / "tasks-diversity", 9, "diversity", clusters=3)
    assert len(buffer) == 9
    assert set(buffer.counts()) == {"a", "b"}


def test_a_gem_beside_it_has_the_reservoir(tmp_path):
    run = Run(tmp_path / "a", task="a", shared=tmp_path, new_rows=rows(8), say=lambda line: None)
    train([replay(policy="priority"), AGEM()], tmp_path / "a", train_rows=rows(8), run=run, steps=2)
    assert {path.name for path in (tmp_path / "buffer").iterdir() if path.is_dir()} >= {"tasks", "tasks-priority"}


def test_key_terms_and_rare_words(tmp_path):
    old = other_rows(12)
    made = train([Replay(fraction=0.5, priority="terms", terms=["ships"])], tmp_path / "terms", old=old, steps=2)
    method = made.stack.methods[0]
    has = np.array(["ships" in row["completion"][0]["content"] for row in old])
    assert np.array_equal(method.priorities.current, has.astype(float))
    made = train([Replay(fraction=0.5, priority="terms")], tmp_path / "rare", old=old, steps=2)
    assert np.ptp(made.stack.methods[0].priorities.current) > 0


def test_a_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "def worth(rows):\n    return [row['loss'] + len(row['answer'].split()) for row in rows]\n"
        "def short(rows):\n    return [1.0]\n"
        "def broken(rows):\n    raise KeyError('tone')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = {"priority": "custom", "measure_rows": 12}
    made = train([replay(function="my_scores:worth", **settings)], tmp_path / "run", steps=4, batch=8)
    method = made.stack.methods[0]
    answers = [
        len(made.processing_class.decode([t for t in labels if t != -100]).split()) for labels in method._rows["labels"]
    ]
    assert method.priorities.next == pytest.approx(losses_of(made) + answers, rel=1e-4)
    for function, match in (
        ("my_scores:short", "one finite number for each"),
        ("my_scores:broken", "failed .KeyError: 'tone'"),
        ("my_scores:number", "no function but int"),
        ("my_scores:missing", "cannot be loaded"),
        ("nowhere:worth", "cannot be loaded"),
        ("worth", "module:function"),
        (None, "module:function"),
    ):
        with pytest.raises(ConfigError, match=match) as caught:
            train([replay(function=function, **settings)], tmp_path / "bad")
        assert "\n" not in str(caught.value)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"exponent": 0.5}, "exponent.*does nothing"),
        ({"correction": 0.5}, "correction.*does nothing"),
        ({"measure_every": 5}, "measure_every.*does nothing"),
        ({"priority": "length", "measure_rows": 5}, "measure_rows.*does nothing"),
        ({"priority": "loss", "terms": ["x"]}, "terms.*goes with"),
        ({"priority": "loss", "function": "a:b"}, "function.*goes with"),
        ({"clusters": 5}, "clusters.*goes with"),
        ({"policy": "priority"}, "no `priority` is set"),
        ({"priority": "loss", "by": "tokens"}, "only rows can be counted"),
    ],
)
def test_settings_without_effect_are_errors(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match) as caught:
        train([Replay(**settings)], tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_host_cannot_do_is_said(tmp_path):
    with pytest.raises(ConfigError, match="dataloader_drop_last"):
        train([replay()], tmp_path / "drop", dataloader_drop_last=True)
    with pytest.raises(ConfigError, match="packed rows"):
        train([replay()], tmp_path / "pack", packing=True)
    with pytest.raises(ConfigError, match="stream"):
        train([replay()], tmp_path / "stream", train_rows=rows(16).to_iterable_dataset())
