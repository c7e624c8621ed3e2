"""What methods that weigh tokens share, on methods whose weights are known."""

import pytest
import torch
from datasets import Dataset
from families import family_model
from tiny import tiny_model, tiny_tokenizer
from training_kit import LAYOUTS, Killed, StopAt, distance, rows, same_bits, stored, texts, train, trainer
from weighing_kit import labelled, run_of, tokens_of

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.dft import DFT
from retain.methods.eaft import EAFT
from retain.methods.flow import FLOW
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.methods.stm import STM
from retain.methods.weighing import Weighing
from retain.models.start_scores import StartScores

ALL = [DFT, EAFT, FLOW, STM]


class Third(Weighing):
    """Every weighed token counts a third."""

    name = "third"

    def weigh(self, tokens, run):
        self.seen = tokens
        return torch.full((len(tokens.labels),), 1 / 3, dtype=torch.float64)


def weights(method, model, ids, labels, source=None, run=None):
    run = run or run_of(model)
    method.on_task_start(model, run)
    return method.token_weights(tokens_of(model, ids, labels, source), run)


@pytest.mark.parametrize("method", ALL)
def test_weights_are_positive_detached_and_follow_the_rows(method):
    model = family_model("llama").double()
    ids, labels = labelled(5)
    run = run_of(model)
    found = weights(method(), model, ids, labels, run=run)
    assert found.shape == (int((labels[:, 1:] != -100).sum()),)
    assert found.min() >= 0
    assert found.std() > 0 or method in (STM, FLOW)  # nothing was seen yet that a limit could come from
    assert not found.requires_grad
    order = torch.tensor([3, 0, 4, 1, 2])
    owner = tokens_of(model, ids, labels).rows
    again = weights(method(), model, ids[order], labels[order], run=run)
    torch.testing.assert_close(again, torch.cat([found[owner == row] for row in order]))


def test_strength_mixes_with_even_weights():
    model = family_model("llama").double()
    full, half = (weights(DFT(strength=s), model, *labelled()) for s in (1.0, 0.5))
    torch.testing.assert_close(half, (1 + full) / 2)


def test_replayed_rows_keep_their_weight_and_do_not_enter_the_mean():
    model = family_model("llama").double()
    ids, labels = labelled(4)
    source = [0, 1, 0, 1]
    run = run_of(model)
    method = Third()
    for step in range(2):
        if step == 0:
            found = weights(method, model, ids, labels, source, run)
        else:
            found = method.token_weights(tokens_of(model, ids, labels, source), run)
        tokens = tokens_of(model, ids, labels, source)
        new = tokens.source == 0
        assert torch.equal(method.seen.rows, tokens.rows[new])
        assert (found[~new] == 1).all()
        torch.testing.assert_close(found[new], torch.full_like(found[new], (1 / 3, 1.0)[step]))
        method.on_step_end(model, run)
    everything = weights(Third(rows="all"), model, ids, labels, source)
    assert (everything < 1).all()


def test_only_replayed_rows_in_a_micro_batch():
    model = family_model("llama").double()
    for method in ALL:
        assert (weights(method(), model, *labelled(2), source=[1, 1]) == 1).all()


def test_flattened_rows_cannot_be_told_apart():
    model = family_model("llama").double()
    ids, labels = labelled(3)
    ids, labels = ids.flatten()[None], labels.flatten()[None]
    tokens = tokens_of(model, ids, labels)
    tokens.batch.source = torch.tensor([0, 1, 0])
    method = DFT()
    method.on_task_start(model, run_of(model))
    with pytest.raises(ConfigError, match=r"methods\.dft\.rows: rows are flattened"):
        method.token_weights(tokens, run_of(model))
    method = DFT(rows="all")
    method.on_task_start(model, run_of(model))
    assert method.token_weights(tokens, run_of(model)).max() < 1


def test_with_replay_the_mean_weight_of_new_tokens_is_one(tmp_path):
    """Replay must not become heavier because new tokens are weighed down."""
    settings = {"steps": 6, "learning_rate": 1e-6, "optim": "sgd"}
    losses = []
    for name, methods in {"plain": [], "third": [Third()]}.items():
        model = tiny_model(tiny_tokenizer()).double()
        made = train([Replay(fraction=0.25), *methods], tmp_path / name, model, **settings)
        lines = [line for line in made.state.log_history if "loss" in line]
        losses.append([line.get("loss/main", line["loss"]) for line in lines])
    assert losses[1][0] < 0.9 * losses[0][0]
    assert losses[1][1:] == pytest.approx(losses[0][1:], rel=1e-3)


def with_new_rows(folder, new):
    return {"run": Run(folder, new_rows=new, say=lambda line: None), "train_rows": new}


@pytest.mark.parametrize("method", [FLOW, STM])
def test_rows_looked_at_once_and_a_stream_give_the_same_losses(method, tmp_path):
    """After a pass over the rows a stream knows the limit that a look before training gives."""
    new = rows(16)
    settings = {"steps": 8, "learning_rate": 1e-9}
    known = train([method()], tmp_path / "known", **with_new_rows(tmp_path / "known", new), **settings)
    stream = train([method()], tmp_path / "stream", train_rows=new, **settings)
    one, other = known.stack.methods[0], stream.stack.methods[0]
    shown = [count for micro in stream.seen for count in micro["tokens"]]
    assert other._counts.sum() == (len(shown) if method is FLOW else sum(shown))
    for share in (0.1, 0.5):
        assert other.limit(share) == pytest.approx(one.limit(share), rel=0.2)
    log = [[e[f"{method.name}/weight"] for e in m.state.log_history if "loss" in e] for m in (known, stream)]
    assert log[1][4:] == pytest.approx(log[0][4:], abs=0.15)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", [FLOW, STM])
def test_under_autocast_a_stream_is_looked_at_as_a_data_set_is(method, lora, tmp_path, monkeypatch):
    """Row by row, so that no padding differs: the losses of a look in a step are those of the look before training."""
    looks = []

    def losses(self, inputs, labels):
        found = plain(self, inputs, labels)
        looks[-1][str(inputs["input_ids"].tolist())] = found
        return found

    plain = StartScores.losses
    monkeypatch.setattr(StartScores, "losses", losses)
    for name, one in (("known", {"new_rows": rows(4)}), ("stream", {})):
        looks.append({})
        run = Run(tmp_path / name, say=lambda line: None, **one)
        team = [*([LoRA(r=4)] if lora else []), method(batch_size=1)]
        train(team, tmp_path / name, run=run, train_rows=rows(4), batch=1, bf16=True)
    known, stream = looks
    assert len(known) == 4
    assert known.keys() == stream.keys()
    for text in known:
        assert torch.equal(known[text], stream[text])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", [rows, texts])
@pytest.mark.parametrize("method", [FLOW, STM])
def test_known_rows_cost_no_pass_while_training(method, form, layout, tmp_path):
    new = form(16)
    made = trainer([method()], tmp_path, **with_new_rows(tmp_path, new), steps=3, batch=2, **layout)
    asked = []
    mine = made.stack.methods[0]
    start = mine.on_task_start

    def on_task_start(model, run):
        start(model, run)
        ask = mine._start._ask
        mine._start._ask = lambda *rest: asked.append(1) or ask(*rest)

    mine.on_task_start = on_task_start
    made.train()
    assert not asked
    assert len(mine._start._kept) == (16 if "packing_strategy" not in layout else len(made.train_dataset))
    assert made.state.global_step == 3
    assert all(0 <= line[f"{method.name}/weight"] < 1 for line in made.state.log_history if "loss" in line)


@pytest.mark.parametrize("method", [FLOW, STM])
def test_killed_and_resumed_with_known_rows(method, tmp_path):
    new = rows(16)
    saving = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    straight = train([method()], tmp_path / "straight", **with_new_rows(tmp_path / "straight", new), **saving)
    killed = with_new_rows(tmp_path / "killed", new)
    with pytest.raises(Killed):
        train([method()], tmp_path / "killed", callbacks=[StopAt(5)], **killed, **saving)
    again = trainer([method()], tmp_path / "killed", **with_new_rows(tmp_path / "killed", new), **saving)
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), stored(straight.model))


@pytest.mark.parametrize("method", [FLOW, STM])
def test_known_rows_under_accumulation(method, tmp_path):
    new = rows(16)

    def run(folder, **settings):
        model = tiny_model(tiny_tokenizer()).double()
        where = tmp_path / folder
        made = train([method()], where, model, **with_new_rows(where, new), adam_epsilon=1e-4, **settings)
        return stored(made.model)

    whole, split = run("whole", batch=4), run("split", batch=2, gradient_accumulation_steps=2)
    assert distance(whole, split) < 2e-7


def test_rows_without_anything_to_learn_are_a_stream(tmp_path):
    empty = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4)
    made = trainer([FLOW()], tmp_path, run=Run(tmp_path, new_rows=empty, say=lambda line: None))
    made.train()
    assert made.stack.methods[0].limit(0.5) > 0
