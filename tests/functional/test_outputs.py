"""Logits as the model gives them; what is made of them does not depend on the tile."""

import pytest
import torch
from families import SCALED, family_model, token_batch

from retain.errors import ConfigError
from retain.functional import divergence, outputs
from retain.functional.tiled_head import Head
from retain.models import params


def head_and_hidden(n=7, v=11, h=5):
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((v, h), (v,), (n, h))
    )
    return Head(weight.requires_grad_(), bias.requires_grad_(), 0.5, 3.0), hidden.requires_grad_()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", *SCALED])
def test_logits_are_those_of_the_model(kind):
    model, ids = family_model(kind).double(), token_batch()
    hidden = params.hidden_states(model, {"input_ids": ids})
    found = outputs.logits(hidden.flatten(0, 1), Head(*params.head(model), *params.logit_rules(model)))
    torch.testing.assert_close(found, model(ids).logits.flatten(0, 1))


def test_centred_norm_and_its_gradient_are_the_dense_ones():
    head, hidden = head_and_hidden()
    inputs = (hidden, head.weight, head.bias)
    z = 3.0 * torch.tanh(0.5 * (hidden @ head.weight.T + head.bias) / 3.0)
    wanted = (z - z.mean(1, keepdim=True)).square().sum()
    truths = torch.autograd.grad(wanted, inputs)
    for tile in (None, 1, 3):
        found = outputs.centred_norm(hidden, head, tile)
        torch.testing.assert_close(found, wanted)
        for slope, truth in zip(torch.autograd.grad(found, inputs), truths):
            torch.testing.assert_close(slope, truth)


def test_a_constant_on_all_logits_changes_nothing():
    head, hidden = head_and_hidden()
    plain, shifted = Head(head.weight, head.bias), Head(head.weight, head.bias + 17.0)
    one, other = outputs.centred_norm(hidden, plain), outputs.centred_norm(hidden, shifted)
    torch.testing.assert_close(one, other)
    for slope, truth in zip(torch.autograd.grad(one, hidden), torch.autograd.grad(other, hidden)):
        torch.testing.assert_close(slope, truth)


def test_top_k_is_the_dense_one_for_every_tile():
    head, hidden = head_and_hidden()
    ids, values = divergence.top_k(outputs.logits(hidden, head), 4)
    for tile in (None, 1, 3):
        found = outputs.top_k(hidden, head, 4, tile)
        assert torch.equal(found[0], ids)
        torch.testing.assert_close(found[1], values.detach())
        assert not found[1].requires_grad
    assert outputs.top_k(hidden[:0], head, 4)[0].shape == (0, 4)
    with pytest.raises(ConfigError, match=r"top_k\.k: 12"):
        outputs.top_k(hidden, head, 12)
