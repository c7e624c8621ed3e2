"""New blocks in every family: no change before they learn, and the same model when it is opened again."""

import copy

import pytest
import torch
from families import FAMILIES, LLAMA, OTHERS, SCALED, family_model, take_steps, token_batch
from transformers import AutoModelForCausalLM

from retain.errors import ModelError
from retain.models import expansion, params, structure


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def written(model, ids, cache):
    return model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12, use_cache=cache)


@pytest.mark.parametrize("kind", [*FAMILIES, *SCALED, *(kind for kind in OTHERS if kind != "mixtral")])
def test_nothing_changes_and_the_same_model_opens_again(kind, tmp_path):
    model = family_model(kind)
    own = copy.deepcopy(model)
    ids = token_batch(2, 9)
    before = logits(model, ids)
    new = expansion.expand(model, 2)
    layers = params.decoder_layers(model)
    assert [i for i, layer in enumerate(layers) if layer in new] == [2, 5]
    assert expansion.marks(model) == [0, 0, 1, 0, 0, 1]
    assert expansion.newest(model) == new
    assert torch.equal(logits(model, ids), before)
    # the originals are the same objects' values, in order
    for mine, theirs in zip([layers[i] for i in (0, 1, 3, 4)], params.decoder_layers(own)):
        for p, q in zip(mine.parameters(), theirs.parameters()):
            assert torch.equal(p, q)
    # with weights that act, cached and uncached writing agree, also in what is opened again
    take_steps(model)
    assert not torch.equal(logits(model, ids), before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert expansion.marks(again) == [0, 0, 1, 0, 0, 1]
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    assert torch.equal(logits(again, ids), logits(model, ids))
    texts = [written(m, ids, cache) for m in (model, again) for cache in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_writers_are_projections_with_biases_or_the_norms_behind():
    model = family_model("gpt_neox")
    new = expansion.expand(model, 1)[0]
    for part in (new.attention.dense, new.mlp.dense_4h_to_h):
        assert not part.weight.any()
        assert not part.bias.any()
    assert new.attention.query_key_value.weight.any()
    gemma = expansion.expand(family_model("gemma2"), 1)[0]
    assert bool((gemma.post_attention_layernorm.weight == -1).all())  # it scales by 1 + weight
    assert gemma.self_attn.o_proj.weight.any()
    olmo = expansion.expand(family_model("olmo2"), 1)[0]
    assert not olmo.post_feedforward_layernorm.weight.any()


@pytest.mark.parametrize(
    ("marks", "count", "expected"),
    [
        ([0] * 8, 2, [4, 8]),
        ([0] * 6, 1, [6]),
        ([0] * 4, 4, [1, 2, 3, 4]),
        ([0, 0, 1, 0, 0, 1], 2, [3, 6]),
        ([0, 0, 1, 2, 0, 0, 1, 2], 2, [4, 8]),
        ([0] * 7, 3, [2, 4, 7]),
    ],
)
def test_places(marks, count, expected):
    assert expansion.places(marks, count) == expected


def test_a_second_expansion_stands_on_the_first():
    model = family_model("qwen2")
    ids = token_batch()
    expansion.expand(model, 2)
    take_steps(model)
    before = logits(model, ids)
    second = expansion.expand(model, 2)
    assert expansion.marks(model) == [0, 0, 1, 2, 0, 0, 1, 2]
    assert torch.equal(logits(model, ids), before)
    layers = params.decoder_layers(model)
    assert expansion.newest(model) == second == [layers[3], layers[7]]
    assert torch.equal(second[0].self_attn.q_proj.weight, layers[2].self_attn.q_proj.weight)  # a copy of the first's
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(8))
    assert len(model.config.layer_types) == model.config.num_hidden_layers == 8


def test_kinds_of_layers_go_with_their_blocks(tmp_path):
    model = family_model("gemma2")
    kinds = list(model.config.layer_types)
    expansion.expand(model, 4)
    assert model.config.layer_types == [kind for kind in kinds for _ in range(2)]
    for layer, kind in zip(params.decoder_layers(model), model.config.layer_types):
        assert layer.self_attn.layer_type == kind
        assert layer.config is model.config


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("mixtral", LLAMA, "calls no linear layer"),
        ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
         "depends on a block"),
        ("opt", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "do_layer_norm_before": False}, "change the outputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_expanded_says_so(kind, settings, words):
    model = family_model(kind, **settings)
    if kind == "opt":  # at their initial values the norms are idempotent, almost
        for p in model.parameters():
            torch.nn.init.normal_(p)
    with pytest.raises(ModelError, match=words) as caught:
        expansion.expand(model, 1)
    assert "\n" not in str(caught.value)


def test_structure_leaves_nothing_behind():
    model = family_model("falcon")
    model.train()
    structure.blocks(model)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_on_a_model_without_weights(kind):
    from retain.models import bottleneck

    with torch.device("meta"):
        model = family_model(kind)
    expansion.expand(model, 1)
    assert len(params.decoder_layers(model)) == 5
    bottleneck.add(model, 4, True, 0)
    assert len(bottleneck.sites(model)) == 10
