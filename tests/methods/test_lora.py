"""LoRA: equal to the base at first, the right layers on each family, merged between tasks."""

import typing

import pytest
import torch
from families import FAMILIES, OTHERS, SCALED, family_model, take_steps, token_batch
from training_kit import merged, same_bits, stored, train

from retain.errors import ConfigError
from retain.methods.base import Stack
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.methods.olora import OLoRA
from retain.methods.slao import SLAO
from retain.models import params

#: Modules that hold query, value, and all of attention.
LAYERS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "mistral"), ("q_proj v_proj", "q_proj k_proj v_proj o_proj")),
    "opt": ("q_proj v_proj", "q_proj k_proj v_proj out_proj"),
    "phi3": ("qkv_proj", "qkv_proj o_proj"),
    "gpt2": ("c_attn", "c_attn c_proj"),
    "gpt_neox": ("query_key_value", "query_key_value dense"),
    "falcon": ("query_key_value", "query_key_value dense"),
}


def adapted(model, index=1, **settings):
    return LoRA(**settings).prepare_model(model, Run(directory=None, task_index=index))


def layers(model):
    return {name.rsplit(".", 1)[-1] for name in params.lora_pairs(model)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_starts_at_the_given_model(kind):
    model = family_model(kind)
    ids = token_batch()
    with torch.no_grad():
        before = model(ids).logits
        after = adapted(model, r=4)(ids).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", FAMILIES)
def test_presets_find_the_right_layers(kind):
    qv, attention = (set(words.split()) for words in LAYERS[kind])
    assert layers(adapted(family_model(kind), r=2, targets="qv")) == qv
    assert layers(adapted(family_model(kind), r=2, targets="attention")) == attention
    everywhere = adapted(family_model(kind), r=2)
    head = everywhere.get_base_model().get_output_embeddings()
    for name, module in params.causal(family_model(kind)).named_modules():
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear") and "lm_head" not in name:
            assert name in params.lora_pairs(everywhere) or name == "embed_out"
    assert not hasattr(head, "lora_A"), "the output layer has no adapter"


@pytest.mark.parametrize("kind", [*FAMILIES, *SCALED, *OTHERS])
def test_attention_is_all_of_it_and_nothing_else(kind):
    model = family_model(kind)
    attention = [m for m in params.causal(model).modules() if "Attention" in type(m).__name__]
    inside = {id(p) for module in attention for p in module.parameters() if p.dim() == 2}
    for settings in ({"targets": "attention"}, {"domain": "middle"}):
        pairs = params.lora_pairs(adapted(family_model(kind), **{"r": 2} | settings))
        assert {name + ".weight" for name in pairs} == {n for n, p in model.named_parameters() if id(p) in inside}


def test_only_factors_learn_and_the_base_stays():
    model = family_model("llama")
    base = stored(model)
    wrapped = adapted(model, r=3)
    learning, total = params.counts(wrapped)
    pairs = params.lora_pairs(wrapped)
    assert learning == sum(3 * (p.A.shape[1] + p.B.shape[0]) for p in pairs.values())
    assert total == learning + sum(t.numel() for t in base.values())
    take_steps(wrapped)
    after = {name.replace(".base_layer", ""): t for name, t in stored(wrapped).items() if "lora_" not in name}
    assert same_bits(after, base)


def test_scaling_is_alpha_over_r():
    for options, wanted in (({"r": 4}, 2.0), ({"r": 4, "alpha": 4}, 1.0), ({"r": 8, "alpha": 2}, 0.25)):
        pairs = params.lora_pairs(adapted(family_model("llama"), **options))
        assert {pair.scaling for pair in pairs.values()} == {wanted}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_pair_gives_the_change_of_the_weight(kind):
    """ΔW = s·BA is what merging adds, in the orientation that `transposed` says."""
    model = family_model(kind)
    base = stored(model)
    wrapped = adapted(model, r=3, alpha=5)
    take_steps(wrapped)
    changes = {name: (pair.scaling * pair.B @ pair.A).detach() for name, pair in params.lora_pairs(wrapped).items()}
    turned = {name for name, pair in params.lora_pairs(wrapped).items() if pair.transposed}
    assert bool(turned) == (kind == "gpt2")
    whole = stored(wrapped.merge_and_unload())
    for name, change in changes.items():
        difference = whole[f"{name}.weight"] - base[f"{name}.weight"]
        torch.testing.assert_close(change.T if name in turned else change, difference, atol=1e-6, rtol=1e-4)


def test_the_next_task_merges_and_starts_afresh():
    model = adapted(family_model("llama"), r=4)
    take_steps(model)
    ids = token_batch()
    with torch.no_grad():
        before = model(ids).logits
        following = adapted(model, index=2, r=4)
        after = following(ids).logits
    assert (before - after).abs().max() < 1e-5
    pairs = params.lora_pairs(following)
    assert len(pairs) == 28
    assert all(not pair.B.any() and pair.A.any() for pair in pairs.values())
    assert sum("lora_A" in name for name, _ in following.named_parameters()) == 28, "the first adapter is gone"


def test_the_same_run_draws_the_same_factors_and_another_task_others():
    first, again = adapted(family_model("llama"), r=4), adapted(family_model("llama"), r=4)
    other = adapted(family_model("llama"), index=2, r=4)
    assert same_bits(stored(first), stored(again))
    assert not same_bits(stored(first), stored(other))


def test_dora_has_magnitudes_and_learns(tmp_path):
    made = train([LoRA(r=2, dora=True)], tmp_path)
    names = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert sum("magnitude" in name for name in names) == len(params.lora_pairs(made.model))


def test_dropout_reaches_the_adapter():
    model = adapted(family_model("llama"), r=2, dropout=0.5)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p} == {0.5}


def test_layers_that_are_not_there_are_an_error():
    with pytest.raises(ConfigError, match=r"lora\.targets: unknown 'q_prj'\. Did you mean 'q_proj'\?"):
        adapted(family_model("llama"), targets=["q_prj"])
    with pytest.raises(ConfigError, match=r"lora\.alpha"):
        LoRA(alpha=0)
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        LoRA(targets="everything")
    assert layers(adapted(family_model("llama"), targets=["down_proj"])) == {"down_proj"}


@pytest.mark.parametrize(
    ("domain", "r", "targets"), [("near", 8, "qv"), ("middle", 16, "attention"), ("far", 32, "all")]
)
def test_a_preset_is_the_same_as_its_settings(domain, r, targets):
    preset = params.lora_pairs(adapted(family_model("llama"), domain=domain))
    assert preset.keys() == params.lora_pairs(adapted(family_model("llama"), r=r, targets=targets)).keys()
    assert {(len(pair.A), pair.scaling) for pair in preset.values()} == {(r, 2.0)}
    assert LoRA(domain=domain, r=3, targets=["q_proj"]).config.model_dump(include={"r", "targets"}) == {
        "r": 3,
        "targets": ["q_proj"],
    }, "what is given goes before the preset"
    assert not LoRA(domain=domain, r=0).active


KINDS = [kind for kind in typing.get_args(LoRA.Config.model_fields["kind"].annotation) if kind != "lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_begin_at_the_model_learn_and_are_merged(kind):
    model, ids = family_model("llama"), token_batch()
    base = stored(model)
    with torch.no_grad():
        before = model(ids).logits
        wrapped = adapted(model, kind=kind, r=4)
        start = wrapped(ids).logits
    assert {config.peft_type.lower() for config in wrapped.peft_config.values()} == {kind}
    assert (start - before).abs().max() < 1e-4
    learning, total = params.counts(wrapped)
    assert 0 < learning < total / 2
    take_steps(wrapped)
    held = {name.replace(".base_layer", ""): t for name, t in stored(wrapped).items()}
    assert same_bits({name: held[name] for name in base}, base)
    with torch.no_grad():
        after = wrapped(ids).logits
        following = adapted(wrapped, index=2, kind=kind, r=4)
        merged_logits = following(ids).logits
    assert (after - before).abs().max() > 0.05
    assert (merged_logits - after).abs().max() < 1e-3


def test_other_kinds_train_and_are_refused_where_factors_are_needed(tmp_path):
    made = train([LoRA(kind="lokr", r=4)], tmp_path, steps=2)
    assert not same_bits(merged(made.model), merged(train([LoRA(r=4)], tmp_path / "lora", steps=2).model))
    for method in (OLoRA(), SLAO()):
        for team in ([method, LoRA(kind="ia3")], [LoRA(kind="ia3"), method]):
            with pytest.raises(ConfigError, match=rf"methods\.{method.name}: no LoRA factor is trained"):
                train(team, tmp_path / method.name)
    for setting in ({"dora": True}, {"dropout": 0.1}, {"alpha": 3}):
        with pytest.raises(ConfigError, match=rf"methods\.lora\.{next(iter(setting))}: `kind: ia3` has none"):
            adapted(family_model("llama"), kind="ia3", **setting)


DOMAINS = {"medical": {"r": 8, "targets": "qv"}, "law": {"r": 3}, "near": {"domain": "near", "alpha": 4}}


@pytest.mark.parametrize(
    ("task", "r", "scaling", "where"),
    [
        ("medical", 8, 2.0, {"q_proj", "v_proj"}),
        ("law", 3, 2.0, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("near", 8, 0.5, {"q_proj", "v_proj"}),
        ("other", 4, 1.5, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_a_domain_has_its_rank_and_layers_and_else_those_of_all(task, r, scaling, where):
    said = []
    method = LoRA(r=4, alpha=6, targets="attention", domains=DOMAINS)
    model = method.prepare_model(family_model("llama"), Run(directory=None, task=task, say=said.append))
    assert {(len(pair.A), pair.scaling) for pair in params.lora_pairs(model).values()} == {(r, scaling)}
    assert layers(model) == where
    assert len(said) == 1
    assert said[0].startswith(f"lora: task '{task}' has r {r} on ")
    assert ("no domain has this name" in said[0]) == (task == "other")


def test_mistakes_in_domains_are_one_line():
    with pytest.raises(ConfigError, match=r"methods\.lora\.domains: unknown 'medcal'\. Did you mean 'medical'\?"):
        Stack([LoRA(domains={"medcal": {"r": 2}})]).check_needs(frozenset(), ["medical", "law"])
    Stack([LoRA(domains={"law": {"r": 2}})]).check_needs(frozenset(), ["medical", "law"])
    for domains, words in (({"law": {"r": 0}}, "'law' has r 0"), ({"law": {"rank": 3}}, "domains")):
        with pytest.raises(ConfigError, match=words) as caught:
            LoRA(domains=domains)
        assert "\n" not in str(caught.value)
    model = family_model("llama")
    model.is_quantized = True
    with pytest.raises(ConfigError, match=r"methods\.lora\.domains: on a quantised base one adapter learns all"):
        adapted(model, domains={"law": {"r": 2}})
