"""Freezing: on many families the frozen part stays bit for bit, and the counts are what was asked."""

import itertools

import pytest
import torch
from families import FAMILIES, family_model, names_below, take_steps, token_batch
from training_kit import merged, stored, train

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.freeze import Freeze
from retain.methods.lora import LoRA
from retain.models import params


@pytest.fixture(params=FAMILIES)
def family(request):
    return family_model(request.param)


def frozen_names(model, **settings):
    said = []
    Freeze(**settings).prepare_model(model, Run(directory=None, say=said.append))
    assert len(said) == 1
    return {name for name, p in model.named_parameters() if not p.requires_grad}, said[0]


def test_half_of_the_layers_stay_bit_for_bit(family):
    before = stored(family)
    frozen, said = frozen_names(family, share=0.5)
    layers = params.decoder_layers(family)
    assert len(layers) == 4
    bottom = {id(p) for layer in layers[:2] for p in layer.parameters()}
    top = {id(p) for layer in layers[2:] for p in layer.parameters()}
    embeddings = {id(family.get_parameter(name)) for name in names_below(family)}
    ids = {id(p) for name, p in family.named_parameters() if name in frozen}
    assert ids == bottom | embeddings
    learning = sum(p.numel() for p in family.parameters() if id(p) not in ids)
    assert f"{learning:,} of {sum(p.numel() for p in family.parameters()):,} " in said
    take_steps(family)
    after = stored(family)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = {id(p) for name, p in family.named_parameters() if not torch.equal(before[name], after[name])}
    assert moved >= {i for i in top if i not in embeddings}


@pytest.mark.parametrize("kind", [*FAMILIES, "bloom", "gpt_neo"])
def test_what_a_frozen_bottom_gives_stays_bit_for_bit(kind):
    """No layer that learns is given anything else than before."""
    model, seen = family_model(kind), []
    frozen_names(model, share=0.5)
    layer = params.decoder_layers(model)[2]
    layer.register_forward_pre_hook(
        lambda module, given, named: seen.append([*given, *named.values()][0]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=token_batch())
    take_steps(model)
    with torch.no_grad():
        model(input_ids=token_batch())
    assert torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize("component", ["attention", "mlp", "embeddings", "norms", "head"])
def test_components_on_every_family(family, component):
    before = stored(family)
    frozen, _ = frozen_names(family, share=0, components=[component])
    if component == "embeddings":
        assert frozen == names_below(family)
    if component == "head":
        assert sum(before[name].numel() for name in frozen) == family.get_output_embeddings().weight.numel()
    take_steps(family)
    after = stored(family)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_components_divide_the_model(family):
    """Every weight is in one component; apart from tied heads, and norms inside attention (in both)."""
    whole = {name for name, _ in family.named_parameters()}
    parts = {c: Freeze(share=0, components=[c]).frozen(family) for c in ("attention", "mlp", "embeddings", "norms")}
    head = Freeze(share=0, components=["head"]).frozen(family)
    assert head <= parts["embeddings"] or not head & set().union(*parts.values())
    for first, second in itertools.combinations(parts, 2):
        both = parts[first] & parts[second]
        assert all({first, second} == {"attention", "norms"} and "_norm" in name for name in both)
    assert whole == set().union(*parts.values()) | head


def test_attention_and_mlp_of_llama_have_the_expected_sizes():
    model = family_model("llama")
    attention = Freeze(share=0, components=["attention"]).frozen(model)
    mlp = Freeze(share=0, components=["mlp"]).frozen(model)
    sizes = stored(model)
    assert sum(sizes[name].numel() for name in attention) == 4 * (32 * 32 * 2 + 32 * 16 * 2)
    assert sum(sizes[name].numel() for name in mlp) == 4 * 3 * 32 * 48


def test_patterns_and_share_add_up():
    model = family_model("llama")
    share = Freeze(share=0.25).frozen(model)
    pattern = Freeze(share=0, patterns=[r"layers\.3\.mlp"]).frozen(model)
    assert len(pattern) == 3
    assert Freeze(share=0.25, patterns=[r"layers\.3\.mlp"]).frozen(model) == share | pattern


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"patterns: 'layer\.99' matches no parameter") as caught:
        Freeze(share=0, patterns=["layer.99"]).prepare_model(family_model("llama"), Run(directory=None))
    assert "\n" not in str(caught.value)


def test_freezing_everything_is_an_error():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        Freeze(share=1.0, components=["head", "norms"]).prepare_model(
            family_model("llama"), Run(directory=None, say=lambda line: None)
        )


def test_tied_embeddings_freeze_the_head_as_well():
    model = family_model("qwen2")
    frozen, _ = frozen_names(model, share=0, components=["head"])
    assert frozen == {"model.embed_tokens.weight"}


def test_adapters_in_frozen_layers_are_frozen(tmp_path, tokenizer):
    made = train([Freeze(share=0.5), LoRA(r=2)], tmp_path)  # the order in the list does not matter
    pairs = params.lora_pairs(made.model)
    assert pairs
    assert all(name.startswith("model.layers.1") for name in pairs)
    plain = train([LoRA(r=2)], tmp_path / "plain")
    assert len(params.lora_pairs(plain.model)) == 2 * len(pairs)
    after = merged(made.model)
    start = {name: p for name, p in made.model.get_base_model().named_parameters() if "base_layer" in name}
    for name, p in start.items():
        moved = not torch.equal(after[name.replace(".base_layer", "")], p)
        assert moved == ("layers.1." in name)


def test_the_recommended_share_is_taken_and_said():
    for similarity, share in ((0.9, "0.55 (of 0.5–0.6"), (0.7, "0.65 (of 0.6–0.7"), (0.2, "0.75 (of 0.7–0.8")):
        model, said = family_model("llama"), []
        size = model.num_parameters()
        Freeze(share="auto", similarity=similarity).prepare_model(model, Run(directory=None, say=said.append))
        count = round(float(share[:4]) * 4)
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert frozen == Freeze(share=count / 4).frozen(family_model("llama"))
        assert said[0] == (
            f"freeze: share {share}, the range for 1–7 B as there is none below) for {size / 1e9:.3g} B parameters and "
            f"similarity {similarity:g}: the lowest {count} of 4 layers."
        )
        assert "stay trainable" in said[1]


@pytest.mark.parametrize("settings", [{"share": "auto"}, {"similarity": 0.5}, {"share": 0.3, "similarity": 0.5}])
def test_a_similarity_and_an_automatic_share_go_together(settings):
    with pytest.raises(ConfigError, match=r"`share: auto` and `similarity` .* go together") as caught:
        Freeze(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pattern_freezes_what_it_names_on_every_family(kind):
    model = family_model(kind)
    before = stored(model)
    frozen, said = frozen_names(model, share=0, patterns=[r"\.0\."])
    assert frozen == {name for name in before if ".0." in name}
    learning = sum(before[name].numel() for name in set(before) - frozen)
    assert f"{learning:,} of {sum(t.numel() for t in before.values()):,} " in said
    take_steps(model)
    after = stored(model)
    assert {name for name in before if torch.equal(before[name], after[name])} >= frozen
    assert any(not torch.equal(before[name], after[name]) for name in before)
