"""Bottleneck adapters on models: put on, taken off, written and read, in every family."""

import copy
import json

import pytest
import torch
from families import FAMILIES, family_model, take_steps, token_batch

from retain.errors import RunError
from retain.functional.bottleneck import bottleneck as formula
from retain.functional.bottleneck import parameters_per_site
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import bottleneck, params
from retain.models.load import load_model, parts, save_base, settled


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def stir(model, number=None):
    """Give adapters weights that act."""
    torch.manual_seed(1)
    for parameter in bottleneck.weights(model, number).values():
        torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("kind", [*FAMILIES, "mixtral", "bloom"])
def test_on_and_off_in_every_family(kind, attention):
    model = family_model(kind)
    ids = token_batch(2, 9)
    before, names = logits(model, ids), [name for name, _ in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    assert bottleneck.add(model, 4, attention, 0) == 0
    assert torch.equal(logits(model, ids), before)
    found = bottleneck.sites(model)
    assert len(found) == 4 * (1 + attention)
    added = sum(p.numel() for p in bottleneck.weights(model).values())
    assert added == len(found) * parameters_per_site(32, 8)
    assert added == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in state_params(model, state))
    stir(model)
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    taken = bottleneck.detach(model)
    assert torch.equal(logits(model, ids), before)
    assert [name for name, _ in model.named_modules()] == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    bottleneck.attach(model, taken)
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)


def state_params(model, state):
    return [p for name, p in model.named_parameters() if name in state]


def test_acts_on_what_the_feed_forward_part_adds():
    """Against the block written out by hand."""
    model = family_model("llama").double()
    bottleneck.add(model, 4, True, 0)
    stir(model)
    ids = token_batch(1, 5)
    seen = {}
    layer = model.model.layers[1]
    layer.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(x=args[0], kwargs=kwargs, out=out), with_kwargs=True
    )
    logits(model, ids)

    def through(part, x):
        adapter = part.bottleneck[0]
        return formula(x, adapter.down, adapter.down_bias, adapter.up, adapter.up_bias)

    with torch.no_grad(), bottleneck.detached(model):
        taken = layer.self_attn(layer.input_layernorm(seen["x"]), **seen["kwargs"])[0]
    h = seen["x"] + through(layer.self_attn, taken)
    with bottleneck.detached(model):
        inner = layer.mlp(layer.post_attention_layernorm(h))
    torch.testing.assert_close(h + through(layer.mlp, inner), seen["out"], atol=1e-12, rtol=0)


def test_two_adapters_do_not_interact():
    model = family_model("gpt2")
    ids = token_batch(2, 9)
    bottleneck.add(model, 4, False, 0)
    stir(model)
    model.requires_grad_(False)
    first = {name: p.clone() for name, p in bottleneck.weights(model, 0).items()}
    one = logits(model, ids)
    assert bottleneck.add(model, 8, False, 1) == 1
    assert torch.equal(logits(model, ids), one)
    second = bottleneck.weights(model, 1)
    assert first.keys().isdisjoint(second)
    take_steps(model)
    assert not torch.allclose(logits(model, ids), one, atol=1e-4)
    assert all(torch.equal(p, first[name]) for name, p in bottleneck.weights(model, 0).items())
    for site in bottleneck.sites(model).values():  # without the second it is the first alone
        del site.bottleneck[1]
    assert torch.equal(logits(model, ids), one)


def test_copies_and_swapped_parameters_are_followed():
    model = family_model("llama")
    bottleneck.add(model, 4, False, 0)
    inputs = {"input_ids": token_batch(2, 9)}
    plain = params.hidden_states(model, inputs)
    start = params.snapshot(bottleneck.weights(model))
    copied = copy.deepcopy(model)
    stir(model)
    acting = params.hidden_states(model, inputs)
    assert not torch.allclose(acting, plain, atol=1e-3)
    assert torch.equal(params.hidden_states(copied, inputs), plain)
    assert torch.equal(params.hidden_states(model, inputs, start), plain)
    assert torch.equal(params.hidden_states(model, inputs), acting)


@pytest.mark.parametrize("cache", [True, False])
def test_writing_goes_through_the_adapter(cache):
    model = family_model("qwen2")
    ids = token_batch(1, 5)
    bottleneck.add(model, 4, True, 0)
    stir(model)
    text = model.generate(ids, do_sample=False, max_new_tokens=10, min_new_tokens=10, use_cache=cache)
    for place in range(5, 15):
        scores = logits(model, text[:, :place])[0, -1]
        scores[2] = -torch.inf  # the end may not come
        assert int(scores.argmax()) == int(text[0, place])


def test_in_half_precision_the_adapter_keeps_its_own():
    model = family_model("llama").bfloat16()
    ids = token_batch(2, 9)
    before = logits(model, ids)
    bottleneck.add(model, 4, True, 0)
    assert {p.dtype for p in bottleneck.weights(model).values()} == {torch.float32}
    after = logits(model, ids)
    assert after.dtype == before.dtype
    assert torch.equal(after, before)


# -- on disk -----------------------------------------------------------------------------------------------
def test_written_and_read(tmp_path):
    model = family_model("falcon")
    ids = token_batch(2, 9)
    for number in (0, 1):
        bottleneck.add(model, 4, True, number)
    stir(model)
    bottleneck.save(model, tmp_path / "all")
    bottleneck.save(model, tmp_path / "last", 1)
    again = family_model("falcon")
    bottleneck.load(again, tmp_path / "all")
    assert torch.equal(logits(again, ids), logits(model, ids))
    stir(again, 1)  # other numbers than before, as they are drawn from the start
    assert not torch.equal(logits(again, ids), logits(model, ids))
    bottleneck.load(again, tmp_path / "last")  # in place of the one there
    assert torch.equal(logits(again, ids), logits(model, ids))
    about = json.loads((tmp_path / "last" / "adapter.json").read_text())
    assert about["parameters"] == 8 * parameters_per_site(32, 8)
    assert len(about["sites"]) == 8


def test_mistakes_on_disk_are_one_line(tmp_path):
    model = family_model("llama")
    for number in (0, 1):
        bottleneck.add(model, 4, False, number)
    bottleneck.save(model, tmp_path / "second", 1)
    for other, words in (("gpt2", "is no part of GPT2LMHeadModel"), ("llama", "stands on earlier ones")):
        with pytest.raises(RunError, match=words) as caught:
            bottleneck.load(family_model(other), tmp_path / "second")
        assert "\n" not in str(caught.value)
    (tmp_path / "second" / "adapter.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="damaged"):
        bottleneck.load(family_model("llama"), tmp_path / "second")


def test_parts_of_a_model(tmp_path):
    model = family_model("llama")
    assert list(parts(model)) == ["model"]
    bottleneck.add(model, 4, False, 0)
    stir(model)
    assert list(parts(model)) == ["model", "bottleneck"]  # everything learns
    model.requires_grad_(False)
    for p in bottleneck.weights(model).values():
        p.requires_grad_(True)
    assert list(parts(model)) == ["bottleneck"]
    adapted = LoRA(r=2).prepare_model(model, Run(directory=None))
    assert list(parts(adapted)) == ["adapter", "bottleneck"]


def test_a_folder_with_adapters_opens_with_them(tiny_folder, tmp_path):
    model, words = load_model(str(tiny_folder))
    bottleneck.add(model, 4, False, 0)
    stir(model)
    save_base(model, tmp_path)
    words.save_pretrained(tmp_path)
    ids = token_batch(2, 9)
    base, _ = load_model(str(tiny_folder))
    assert torch.equal(logits(load_model(str(tmp_path))[0], ids), logits(base, ids))
    bottleneck.save(model, tmp_path / "bottleneck")
    assert torch.equal(logits(load_model(str(tmp_path))[0], ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt2", "falcon"])
def test_sites_are_the_same_under_lora(kind):
    plain, adapted = family_model(kind), LoRA(r=2).prepare_model(family_model(kind), Run(directory=None))
    for model in (plain, adapted):
        bottleneck.add(model, 4, True, 0)
    assert list(bottleneck.sites(plain)) == list(bottleneck.sites(adapted))


def test_merging_lora_leaves_the_adapters_where_they_are():
    model = family_model("opt")  # its feed-forward part is two bare linear layers
    bottleneck.add(model, 4, True, 0)
    stir(model)
    ids = token_batch(2, 9)
    before = logits(model, ids)
    adapted = LoRA(r=2).prepare_model(model, Run(directory=None))
    assert not any("bottleneck" in name for name in params.lora_pairs(adapted))
    assert torch.equal(logits(adapted, ids), before)
    for pair in params.lora_pairs(adapted).values():
        torch.nn.init.normal_(pair.B, std=0.1)
    acting = logits(adapted, ids)
    merged = settled(adapted)
    assert len(bottleneck.sites(merged)) == 8
    torch.testing.assert_close(logits(merged, ids), acting, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(acting, before, atol=1e-2)
