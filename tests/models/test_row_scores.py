"""Losses and gradient norms of single rows, against one row at a time through the plain model."""

import pytest
import torch
from tiny import tiny_model
from training_kit import rows, trainer

from retain.methods.base import Method
from retain.models import params
from retain.models.row_scores import row_gradient_norms, row_keys, row_losses


@pytest.fixture
def made(tmp_path):
    return trainer([Method()], tmp_path, tiny_model_64(), train_rows=rows(4))


def tiny_model_64():
    from tiny import tiny_tokenizer

    return tiny_model(tiny_tokenizer()).double().eval()


def alone(model, row):
    """Mean loss of a row by the model's own logits."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    plain = tiny_model_64()
    plain.load_state_dict(model.state_dict())
    logits = plain(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100)
    return loss, plain


def test_losses_and_norms_of_each_row(made):
    data = made._tokenised(rows(7))
    losses = row_losses(made.model, made.run.batches(data, 3))
    with params.evaluating(made.model):
        norms = row_gradient_norms(made.model, made.run.batches(data, 1))
    assert len(losses) == len(norms) == 7
    for row, loss, norm in zip(data, losses, norms):
        expected, plain = alone(made.model, row)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
        gradients = torch.autograd.grad(expected, [p for p in plain.parameters() if p.requires_grad])
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-5)
    assert len({round(float(norm), 9) for norm in norms}) > 3
    assert all(p.grad is None for p in made.model.parameters())


def test_a_batch_of_rows_is_not_one_row(made):
    """The norm of a batch's gradient is not what its rows have: each needs a pass of its own."""
    data = made._tokenised(rows(4))
    norms = row_gradient_norms(made.model, made.run.batches(data, 1))
    together = row_gradient_norms(made.model, made.run.batches(data, 4))
    assert len(together) == 1
    assert abs(float(together[0]) - norms.mean()) > 1e-3


def test_keys_are_of_content(made):
    data = made._tokenised(rows(5))
    keys = row_keys(data)
    assert len(set(keys)) == 5
    assert row_keys(data.select([3, 1])) == [keys[3], keys[1]]
    other = data.map(lambda row: {"labels": [-100, *row["labels"][1:-1], -100]})
    assert not set(row_keys(other)) & set(keys)
