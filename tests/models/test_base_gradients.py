"""Gradients of base weights under LoRA: those from layer inputs and output slopes are those of autograd."""

import pytest
import torch
from families import family_model, token_batch

from retain.functional.fisher import plain_gradients
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.base_gradients import base_gradients, observed


def adapted(kind):
    model = LoRA(r=2).prepare_model(family_model(kind).double(), Run(directory=None))
    for pair in params.lora_pairs(model).values():
        torch.nn.init.normal_(pair.B, std=0.1)  # as in the middle of training: the adapter is in the graph
    return model.eval()


def loss(model):
    return model(token_batch()).logits.log_softmax(-1)[..., 3].sum()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_observed_gradients_are_those_of_autograd(kind):
    model = adapted(kind)
    pairs = params.lora_pairs(model)
    with base_gradients(model) as (bases, gradients):
        assert gradients is plain_gradients
        wanted = dict(zip(bases, gradients(loss(model), list(bases.values()), False)))
    assert not any(base.requires_grad for base in bases.values()), "frozen again"
    with observed(model, pairs) as (stand_ins, gradients):
        for _ in range(2):  # nothing of the first batch is left in the second
            found = dict(zip(stand_ins, gradients(loss(model), list(stand_ins.values()), False)))
            assert found.keys() == wanted.keys() == pairs.keys()
            for name, gradient in found.items():
                assert gradient.shape == stand_ins[name].shape == pairs[name].base.shape
                torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules()), "no hook is left behind"


def test_a_layer_that_is_not_called_has_no_gradient():
    model = adapted("llama")
    pairs = params.lora_pairs(model)
    first = params.decoder_layers(model)[0]
    with observed(model, pairs) as (stand_ins, gradients):
        hidden = first(torch.randn(1, 3, 32, dtype=torch.float64), position_embeddings=_rotations(model))
        found = dict(zip(stand_ins, gradients(hidden.sum(), list(stand_ins.values()), False)))
    assert {name for name, g in found.items() if g is not None} == {n for n in pairs if ".layers.0." in f".{n}"}


def _rotations(model):
    backbone = params.causal(model).base_model
    return backbone.rotary_emb(torch.zeros(1, 3, 32, dtype=torch.float64), torch.arange(3)[None])
