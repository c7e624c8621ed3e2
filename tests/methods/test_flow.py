"""FLOW: exp(−ℓ/τ) of the first model's losses, keyed by what a row says, with the median over all rows."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import family_model, take_steps
from training_kit import distance, rows, stored, train
from weighing_kit import dense_logits, labelled, run_of, targets, tokens_of

from retain.methods.context import Run
from retain.methods.flow import FLOW
from retain.methods.stm import STM


def losses_by_row(model, ids, labels):
    with torch.no_grad():
        losses = F.cross_entropy(dense_logits(model, ids, labels), targets(labels), reduction="none")
    owner = torch.arange(len(ids))[:, None].expand_as(labels)[:, 1:][labels[:, 1:] != -100]
    return losses, owner, torch.stack([losses[owner == row].mean() for row in range(len(ids))])


def known(model, ids, labels, **settings):
    """A method that has looked at these rows, in batches of two."""
    method = FLOW(**settings)
    run = run_of(model, new_rows=range(len(ids)))
    run.batches = lambda given, size: (
        ({"input_ids": ids[i : i + size]}, labels[i : i + size]) for i in range(0, len(given), size)
    )
    method.on_task_start(model, run)
    return method, run


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_weight_is_the_formula(kind, unit):
    model = family_model(kind).double()
    base = copy.deepcopy(model)
    ids, labels = labelled(7)
    method, run = known(model, ids, labels, unit=unit, batch_size=2)
    take_steps(model, 3)
    by_token, owner, by_row = losses_by_row(base, ids, labels)
    counted = by_token if unit == "token" else by_row
    tau = float(np.median(counted.numpy()))
    assert method.limit(0.5) == pytest.approx(tau)
    own = by_token if unit == "token" else by_row[owner]
    order = torch.tensor([4, 2, 6])
    found = method.token_weights(tokens_of(model, ids[order], labels[order]), run)
    wanted = torch.cat([torch.exp(-own[owner == row] / tau) for row in order])
    torch.testing.assert_close(found, wanted)
    assert found.std() > 1e-3


def test_the_median_row_weighs_one_over_e_and_easier_ones_more():
    model = family_model("llama").double()
    ids, labels = labelled(7)
    method, run = known(model, ids, labels)
    _, owner, by_row = losses_by_row(model, ids, labels)
    found = method.token_weights(tokens_of(model, ids, labels), run)
    rows_ = torch.stack([found[owner == row][0] for row in range(7)])
    assert float(rows_[by_row.argsort()[3]]) == pytest.approx(math.exp(-1))
    assert torch.equal(rows_.argsort(descending=True), by_row.argsort())


def test_a_large_tau_is_plain_training_once_normalised():
    """τ → ∞: all weights are alike, and their mean is 1."""
    model = family_model("llama").double()
    ids, labels = labelled(7)
    method, run = known(model, ids, labels)
    method._all = method._all * 1e9
    for step in range(2):
        found = method.token_weights(tokens_of(model, ids, labels), run)
        method.on_step_end(model, run)
        assert step == 0 or float((found - 1).abs().max()) < 1e-6


def test_the_first_step_of_a_stream_counts_every_row_as_the_median_one():
    model = family_model("llama").double()
    run, method = run_of(model), FLOW()
    method.on_task_start(model, run)
    tokens = tokens_of(model, *labelled(7))
    first = method.token_weights(tokens, run)
    torch.testing.assert_close(first, torch.full_like(first, math.exp(-1)))
    method.on_step_end(model, run)
    by_row = losses_by_row(model, *labelled(7))[2]
    assert method.limit(0.5) == pytest.approx(float(by_row.median()), rel=0.01)
    assert method.token_weights(tokens, run).std() > 1e-3


def test_in_training_with_another_that_weighs(tmp_path):
    new = rows(16)
    run = Run(tmp_path / "a", new_rows=new, say=lambda line: None)
    made = train([FLOW(), STM(threshold=50)], tmp_path / "a", run=run, train_rows=new)
    alone = train([FLOW()], tmp_path / "b", train_rows=new)
    assert distance(stored(made.model), stored(alone.model)) > 1e-4
    assert all(0 < line["flow/weight"] < 1 for line in made.state.log_history if "flow/weight" in line)
