"""Extra passes: sums over the inputs of linear layers and gradients, against slow loops."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from families import FAMILIES, family_model, token_batch

from retain.methods.context import Run, answer_loss
from retain.methods.lora import LoRA
from retain.models import params, passes


def batch(padded=2):
    ids = token_batch(rows=3, length=7)
    mask = torch.ones_like(ids)
    mask[0, 7 - padded :] = 0
    labels = ids.clone()
    labels[:, :3] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_blocks_is_found_once(family):
    model = family_model(family)
    layers = passes.linear_layers(model)
    matrices = {id(p) for block in params.decoder_layers(model) for p in block.parameters() if p.dim() == 2}
    assert {id(layer.weight) for layer in layers} == matrices
    assert len(layers) == len(matrices)
    for layer in layers:
        assert layer.oriented(layer.weight).shape == layer.shape
        x = torch.randn(2, layer.shape[1])
        torch.testing.assert_close(
            layer.module(x) - layer.module(torch.zeros_like(x)), x @ layer.oriented(layer.weight).T
        )


def test_adapted_layers_have_the_same_names_and_frozen_ones_are_left_out():
    names = [layer.name for layer in passes.linear_layers(family_model("llama"))]
    adapted = LoRA(r=2, targets="qv").prepare_model(family_model("llama"), Run(directory=None))
    layers = passes.linear_layers(adapted)
    assert [layer.name for layer in layers] == [n for n in names if n.endswith(("q_proj", "v_proj"))]
    assert all(layer.shape == layer.oriented(layer.weight).shape for layer in layers)
    start = params.snapshot(params.trainable(adapted))
    assert passes.new_adapters(adapted, start)
    next(t for name, t in start.items() if "lora_B" in name)[0, 0] = 1
    assert not passes.new_adapters(adapted, start)


@pytest.mark.parametrize("skip_first", [False, True])
def test_sums_run_over_real_tokens_only(skip_first):
    model = family_model("llama").double()
    inputs, labels = batch()
    layers = [layer for layer in passes.linear_layers(model) if layer.name == "model.layers.0.self_attn.q_proj"]
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(inputs["input_ids"])).detach()
    slow = torch.zeros(32, 32, dtype=torch.float64)
    for row in range(3):
        for place in range(7):
            if inputs["attention_mask"][row, place] and not (skip_first and place == 0):
                slow += torch.outer(x[row, place], x[row, place])
    whole = passes.input_sums(model, layers, [(inputs, labels)], True, skip_first)
    torch.testing.assert_close(whole[layers[0].name], slow)
    single = [({k: v[i : i + 1] for k, v in inputs.items()}, labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(passes.input_sums(model, layers, single, True, skip_first)[layers[0].name], slow)
    squares = passes.input_sums(model, layers, [(inputs, labels)], False, skip_first)[layers[0].name]
    torch.testing.assert_close(squares, slow.diagonal())
    assert not layers[0].module._forward_pre_hooks


def test_rows_without_padding_are_told_apart_by_their_positions():
    model = family_model("llama").double()
    layers = passes.linear_layers(model)[:1]
    ids = token_batch(rows=1, length=6)
    flat = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).detach()[0]
    found = passes.input_sums(model, layers, [(flat, ids)], False, True)
    torch.testing.assert_close(found[layers[0].name], x[[1, 2, 4, 5]].square().sum(0))


def test_gradients_are_those_of_the_summed_loss_and_leave_grad_alone():
    model = family_model("llama").double()
    inputs, labels = batch()
    learning = list(params.trainable(model).values())
    logits = model(**inputs).logits[:, :-1]
    mask = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(logits[mask].double(), labels[:, 1:][mask], reduction="sum")
    wanted, loss = torch.autograd.grad(loss, learning), loss.detach()
    single = [({k: v[i : i + 1] for k, v in inputs.items()}, labels[i : i + 1]) for i in range(3)]
    for batches in ([(inputs, labels)], single):
        found, value, tokens = passes.gradients(model, learning, batches, answer_loss)
        assert value == pytest.approx(float(loss))
        assert tokens == int(mask.sum())
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in learning)
    doubled, value, _ = passes.gradients(model, learning, single, answer_loss, lambda tensor: 2 * tensor)
    assert value == pytest.approx(2 * float(loss))
    torch.testing.assert_close(doubled[0], 2 * wanted[0], rtol=1e-6, atol=1e-8)
    nothing, value, tokens = passes.gradients(model, learning, [], answer_loss)
    assert (value, tokens) == (0, 0)
    assert not any(bool(t.any()) for t in nothing)


@pytest.mark.parametrize(
    ("kind", "host", "wanted", "unscaled"),
    [
        ("no", DistributedType.NO, None, None),
        ("bf16", DistributedType.NO, torch.bfloat16, torch.bfloat16),
        ("fp16", DistributedType.NO, torch.float16, None),
        ("bf16", DistributedType.DEEPSPEED, None, None),
    ],
)
def test_passes_compute_as_the_host_does(kind, host, wanted, unscaled, monkeypatch):
    """In float16 only where gradients are scaled; a host that holds the model in half precision uses no autocast."""
    state = SimpleNamespace(mixed_precision=kind, distributed_type=host)
    monkeypatch.setattr(passes, "AcceleratorState", Fixed(state))
    x = torch.randn(2, 2)
    for scaled, dtype in ((True, wanted), (False, unscaled)):
        with passes.precision(x.device, scaled):
            assert (x @ x).dtype == (dtype or torch.float32)


def test_without_a_trainer_passes_compute_as_what_is_around_them(monkeypatch):
    monkeypatch.setattr(passes, "AcceleratorState", Fixed(None))
    x = torch.randn(2, 2)
    with passes.precision(x.device):
        assert (x @ x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), passes.precision(x.device):
        assert (x @ x).dtype == torch.bfloat16


class Fixed:
    """accelerate's state of the process as it is told to be."""

    def __init__(self, state):
        self.state, self._shared_state = state, {} if state is None else {"known": True}

    def __call__(self):
        return self.state
