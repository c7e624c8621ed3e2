"""Hidden states on old rows: nothing to pay at the start, the dense loss later, the base of the run for ever."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from training_kit import LAYOUTS, finite, rows, same_bits, stored, texts, train, trainer

from retain.errors import ConfigError, DataError, RunError
from retain.methods.context import Run, StepBatch
from retain.methods.features import Features
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.load import settled


def shown(made):
    return [line["loss/features"] for line in made.state.log_history if "loss/features" in line]


def states_of(made, model, data):
    """Supervised last hidden states, row by row, from the plain model."""
    found = []
    for inputs, labels in made.run.batches(data, 1):
        with params.evaluating(model):
            hidden = params.causal(model)(**inputs, output_hidden_states=True).hidden_states[-1]
        found.append(hidden[:, :-1][labels[:, 1:] != -100])
    return found


def by_hand(past, now, loss):
    """GeRe's loss in units of σ from all states of the past, and those of the drawn rows then and now."""
    every = torch.cat(past["all"]).double()
    mean, deviation = every.mean(0), every.std(0, correction=0)
    h0, h = ((torch.cat(t).double() - mean) / deviation for t in (past["drawn"], now))
    if loss == "mse":
        return (h - h0).square().mean()
    low, high = h0 <= -1, h0 >= 1
    paid = torch.where(low, torch.relu(h + 1), torch.relu(h - 1) + torch.relu(-1 - h))
    paid = torch.where(high, torch.relu(1 - h), paid)
    return paid.sum() / (paid > 0).sum()


@pytest.mark.parametrize("loss", ["margin", "mse"])
@pytest.mark.parametrize("lora", [False, True])
def test_value_and_gradient_are_the_dense_ones(loss, lora, tmp_path, model):
    method = Features(loss=loss, strength=2.0, batch_size=3, bits=16 if loss == "mse" else None)
    made = trainer([*([LoRA(r=4)] if lora else []), method], tmp_path, model.double(), learning_rate=0.03)
    run, old = made.run, made.run.tokenise(rows(12, 100))
    with torch.no_grad():
        past = states_of(made, made.model, old)
    made.train()
    made.model.eval()
    drawn = np.random.default_rng([run.seed, 1, run.step]).permutation(12)[:3]
    now = [states_of(made, made.model, old)[i] for i in drawn]
    wanted = by_hand({"all": past, "drawn": [past[i] for i in drawn]}, now, loss)
    batch = StepBatch({}, torch.zeros(1, 2), torch.zeros(1))
    run.step_batches, run.step_tokens = [batch], 10.0
    found = method.batch_loss(batch, run)
    assert float(wanted.detach()) > 1e-3
    torch.testing.assert_close(found, 2.0 * 10.0 * wanted, rtol=1e-3, atol=1e-5)
    learning = list(params.trainable(made.model).values())
    slopes, truths = (torch.autograd.grad(x, learning, allow_unused=True) for x in (found, 20.0 * wanted))
    for slope, truth in zip(slopes, truths):
        if truth is not None:
            torch.testing.assert_close(slope, truth, rtol=1e-2, atol=1e-3 * float(truth.abs().max()) + 1e-9)
    run.step_batches.append(batch)
    assert method.batch_loss(batch, run) is None, "once per step"


@pytest.mark.parametrize("lora", [False, True])
def test_the_margin_is_zero_at_the_start_and_not_later(lora, tmp_path):
    made = train([*([LoRA(r=4)] if lora else []), Features()], tmp_path, steps=4)
    values = shown(made)
    assert values[0] < 1e-3, "other padding may move a state by a rounding error over its threshold, no more"
    assert values[-1] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["margin", "mse"])
def test_old_texts_cost_nothing_at_the_start_however_rows_come(loss, layout, tmp_path, model):
    method = Features(loss=loss, batch_size=3, bits=16 if loss == "mse" else None)
    made = train([method], tmp_path, model.double(), old=texts(7), steps=4, **LAYOUTS[layout])
    assert len(method._rows) == 7
    assert shown(made)[0] < 1e-6
    assert shown(made)[-1] > 1e-2


@pytest.mark.parametrize("lora", [False, True])
def test_under_autocast_the_margin_is_zero_until_the_weights_move(lora, tmp_path):
    """All old rows at once, so that they are padded as they were when their states were stored."""
    made = train([*([LoRA(r=4)] if lora else []), Features(strength=1.0, batch_size=12)], tmp_path, bf16=True)
    assert shown(made)[0] == 0.0, "any difference would be one of rounding"
    assert shown(made)[-1] > 0.1


def test_under_autocast_squared_distances_are_those_of_storage(tmp_path):
    """16 bits lay at most half of 1 / 65535 of its range between a state and what is stored of it."""
    made = train([Features(loss="mse", strength=1.0, bits=16, batch_size=12)], tmp_path, bf16=True, learning_rate=0.0)
    kept = load_file(tmp_path / "features" / "states.safetensors")
    most = ((kept["high"] - kept["low"]) / 65535 / 2 / kept["deviation"]).square().mean()
    assert all(0 < value <= 1.01 * float(most) for value in shown(made))


def test_squared_distances_are_small_at_the_start(tmp_path):
    coarse, fine = (
        shown(train([Features(loss="mse", strength=1.0, bits=bits)], tmp_path / str(bits)))[0] for bits in (4, 16)
    )
    assert fine < 1e-6
    assert 1e-3 < coarse < 0.1


@pytest.mark.parametrize("loss", ["margin", "mse"])
def test_it_holds_the_states_nearer_to_the_start(loss, tmp_path, model):
    def moved(*methods):
        made = train(methods, tmp_path / str(len(methods)), copy.deepcopy(model), steps=8)
        assert finite(made.model)
        with torch.no_grad():
            now, past = (torch.cat(states_of(made, m, rows(12, 100))) for m in (made.model, model))
        return float((now - past).square().mean())

    assert moved(Features(loss=loss, strength=30.0)) < 0.7 * moved()


def test_every_row_gets_its_turn_and_two_bits_are_stored(tmp_path):
    made = train([Features(batch_size=5)], tmp_path)
    kept = load_file(tmp_path / "features" / "states.safetensors")
    tokens = sum(sum(label != -100 for label in labels[1:]) for labels in made.run.tokenise(rows(12, 100))["labels"])
    assert kept["codes"].shape == (tokens, 32 * 2 // 8)
    assert kept["codes"].dtype == torch.uint8
    drawn = [np.random.default_rng([0, 1, step]).permutation(12)[:5] for step in range(40)]
    assert np.bincount(np.concatenate(drawn), minlength=12).min() > 5


def test_a_later_task_keeps_the_states_of_the_first(tmp_path):
    def once(index, model=None):
        run = Run(tmp_path / str(index), task=f"task {index}", task_index=index, shared=tmp_path, say=lambda line: None)
        made = train([LoRA(r=4), Features()], tmp_path / str(index), model, run=run, train_rows=rows(16, index))
        made.release()
        return made

    first = once(1)
    before = load_file(tmp_path / "features" / "states.safetensors")
    second = once(2, settled(first.model))
    assert same_bits(before, load_file(tmp_path / "features" / "states.safetensors"))
    assert shown(second)[0] > 0.1, "the first task has moved the states"


def test_the_start_of_the_run_is_not_moved_by_it(tmp_path, model):
    """Storing states and drawing rows leaves no trace in the weights of a run that is not trained."""
    before = stored(model)
    assert same_bits(stored(train([Features()], tmp_path, model, learning_rate=0.0).model), before)


def test_what_cannot_work_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="bits: 8 has no effect with 'margin'"):
        train([Features(bits=8)], tmp_path)
    with pytest.raises(ConfigError, match="bits"):
        Features(bits=5)
    silent = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}])
    with pytest.raises(DataError, match="no supervised token"):
        train([Features()], tmp_path / "silent", old=silent)
    train([Features()], tmp_path / "1", steps=1)
    path = tmp_path / "1" / "features" / "states.safetensors"
    kept = load_file(path)
    save_file(kept | {"codes": kept["codes"][1:]}, path)
    with pytest.raises(RunError, match="same old rows"):
        train([Features()], tmp_path / "1", run=Run(tmp_path / "1", task_index=2, say=lambda line: None))
