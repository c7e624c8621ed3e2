"""How high weights lie, in every family, wrapped and tied."""

import pytest
from families import FAMILIES, family_model, names_below

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.layer_strengths import factors, heights


@pytest.mark.parametrize("kind", [*FAMILIES, "bloom", "gpt_neo"])
def test_every_trained_weight_has_a_height(kind):
    model = family_model(kind)
    found = heights(model)
    assert found.keys() == params.trainable(model).keys()
    layers = params.decoder_layers(model)
    names = {id(p): n for n, p in params.causal(model).named_parameters()}
    for i, layer in enumerate(layers):
        assert {found[names[id(p)]] for p in layer.parameters()} == {i / (len(layers) - 1)}
    assert {found[name] for name in names_below(model)} == {0}
    head = model.get_output_embeddings().weight
    assert found[names[id(head)]] == (0 if head is model.get_input_embeddings().weight else 1)


def test_adapted_layers_go_by_the_name_of_the_layer():
    model = LoRA(r=2).prepare_model(family_model("llama"), Run(directory=None, say=lambda line: None))
    found = factors(model, (4.0, 2.0), {r"layers\.1\..*q_proj": 0.5}, "methods.ewc")
    assert found.keys() == params.lora_pairs(model).keys()
    highest = len(params.decoder_layers(model)) - 1
    for name, factor in found.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        assert factor == pytest.approx((4 - 2 * layer / highest) * (0.5 if layer == 1 and "q_proj" in name else 1))
    assert max(found.values()) == 4.0


def test_a_pattern_must_match_what_is_trained():
    model = family_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    assert set(factors(model, None, {"q_proj": 3.0}, "methods.ewc").values()) == {1.0, 3.0}
    with pytest.raises(ConfigError, match=r"methods\.ewc\.patterns: 'embed' matches nothing that is trained"):
        factors(model, None, {"embed": 3.0}, "methods.ewc")
