"""Parameters: the same names however a model is wrapped, and hidden states that give the model's own logits."""

import copy

import pytest
import torch
from families import FAMILIES, OTHERS, SCALED, family_model, names_below, take_steps, token_batch
from training_kit import same_bits

from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import params


def adapted(model, **settings):
    return LoRA(**({"r": 3} | settings)).prepare_model(model, Run(directory=None))


def test_names_do_not_depend_on_the_wrapping():
    model = family_model("llama")
    names = set(params.trainable(model))
    compiled = torch.compile(model, backend="eager")
    assert set(params.trainable(compiled)) == names
    assert params.causal(compiled) is model
    wrapped = adapted(model)
    assert params.causal(wrapped) is model
    assert all("lora_" in name for name in params.trainable(wrapped))
    assert set(params.trainable(wrapped)) == set(params.trainable(model))


def test_counts_take_tied_weights_once():
    model = family_model("qwen2")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    whole = sum(t.numel() for t in {id(p): p for p in model.parameters()}.values())
    assert params.counts(model) == (whole, whole)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert params.counts(model) == (whole - 90 * 32, whole)


def test_snapshot_is_a_copy():
    model = family_model("llama")
    start = params.snapshot(params.trainable(model))
    held = {name: t.clone() for name, t in start.items()}
    take_steps(model)
    assert same_bits(start, held)
    assert all(not t.requires_grad for t in start.values())
    assert all(not torch.equal(start[name], p) for name, p in params.trainable(model).items())


@pytest.mark.parametrize("kind", [*FAMILIES, *SCALED])
def test_hidden_states_and_head_give_the_models_logits(kind):
    model = family_model(kind)
    ids = token_batch()
    with torch.no_grad():
        logits = model(ids).logits
        hidden = params.hidden_states(model, {"input_ids": ids})
        weight, bias = params.head(model)
        scale, cap = params.logit_rules(model)
        found = hidden @ weight.T + (0 if bias is None else bias)
    found = found * scale
    if cap:
        found = cap * torch.tanh(found / cap)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    assert (scale != 1) == (kind in SCALED)
    assert (cap is not None) == (kind == "gemma2")


@pytest.mark.parametrize("kind", FAMILIES)
def test_earlier_weights_in_place_of_the_live_ones(kind):
    model = family_model(kind)
    old = copy.deepcopy(model)
    start = params.snapshot(params.trainable(model))
    take_steps(model)
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = token_batch()
    with torch.no_grad():
        found = params.hidden_states(model, {"input_ids": ids}, start)
        wanted = params.hidden_states(old, {"input_ids": ids})
        now = params.hidden_states(model, {"input_ids": ids})
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (found - now).abs().max() > 1e-3
    assert same_bits(dict(model.named_parameters()), live), "the live weights must stay where they are"
    torch.testing.assert_close(params.head(model, start)[0], old.get_output_embeddings().weight)
    assert not torch.equal(params.head(model)[0], params.head(model, start)[0])


def test_captured_hidden_is_what_the_backbone_gave_and_leaves_no_hook():
    model = family_model("llama")
    ids = token_batch()
    with torch.no_grad(), params.captured_hidden(model) as seen:
        model(ids)
    assert torch.equal(seen[0], params.hidden_states(model, {"input_ids": ids}))
    with pytest.raises(ZeroDivisionError), params.captured_hidden(model):
        raise ZeroDivisionError
    assert not model.model._forward_hooks


def test_adapters_off_is_the_base_and_keeps_what_was_frozen():
    model = family_model("llama")
    ids = token_batch()
    with torch.no_grad():
        base = model(ids).logits
    wrapped = adapted(model)
    take_steps(wrapped)
    frozen = next(iter(params.lora_pairs(wrapped).values())).A
    frozen.requires_grad_(False)
    before = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    with torch.no_grad():
        changed = wrapped(ids).logits
        with params.adapters_off(wrapped):
            assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == before
            off = wrapped(ids).logits
        on = wrapped(ids).logits
    assert torch.equal(off, base)
    assert torch.equal(on, changed)
    assert (off - on).abs().max() > 1e-3
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == before


def test_evaluating_puts_the_flag_back():
    model = family_model("llama").train()
    with params.evaluating(model):
        assert not model.training
    assert model.training
    with pytest.raises(ZeroDivisionError), params.evaluating(model):
        raise ZeroDivisionError
    assert model.training
    with params.evaluating(model.eval()):
        pass
    assert not model.training


@pytest.mark.parametrize("kind", FAMILIES)
def test_decoder_layers_are_found_bottom_first(kind):
    model = family_model(kind)
    blocks = params.decoder_layers(model)
    assert len(blocks) == 4
    order = []
    handles = [b.register_forward_hook(lambda m, a, o, i=i: order.append(i)) for i, b in enumerate(blocks)]
    model(token_batch())
    for handle in handles:
        handle.remove()
    assert order == [0, 1, 2, 3]


def test_pairs_are_those_of_the_active_adapter_that_learns():
    model = adapted(family_model("llama"))
    assert len(params.lora_pairs(model)) == 4 * 7
    assert not params.outside_lora(model)
    for name, p in model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    assert len(params.lora_pairs(model)) == 3 * 7
    assert params.lora_pairs(family_model("llama")) == {}
    assert set(params.outside_lora(family_model("llama"))) == set(params.trainable(family_model("llama")))


def test_start_weights_of_a_half_frozen_half_precision_model_act_as_the_weights_did():
    """Copies are kept in float32; beside bfloat16 weights that are frozen they act in bfloat16 again."""
    model = family_model("llama").bfloat16()
    for layer in params.decoder_layers(model)[:2]:
        layer.requires_grad_(False)
    inputs = {"input_ids": token_batch(2, 5)}
    before, head = params.hidden_states(model, inputs), params.head(model)[0].clone()
    start = params.snapshot(params.trainable(model))
    with torch.no_grad():
        for p in params.trainable(model).values():
            p.add_(0.1)
    assert not torch.equal(params.hidden_states(model, inputs), before)
    assert torch.equal(params.hidden_states(model, inputs, start), before)
    assert torch.equal(params.head(model, start)[0], head)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in [*FAMILIES, *SCALED, *OTHERS]), ("opt", {"word_embed_proj_dim": 16})],
)
def test_what_lies_below_the_layers_is_what_runs_before_them(kind, settings):
    model = family_model(kind, **settings)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for module in params.input_modules(model) for p in module.parameters()}
    assert found == names_below(model)
    for wrapped in (adapted(model), torch.compile(model, backend="eager")):
        again = {id(p) for module in params.input_modules(wrapped) for p in module.parameters()}
        assert again == {id(model.get_parameter(name)) for name in found}
