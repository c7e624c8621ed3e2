"""HFT: two of four and one or two of three, drawn by seed and task, and what is drawn stays bit for bit."""

import re

import numpy as np
import pytest
import torch
from families import FAMILIES, family_model, take_steps
from training_kit import stored, train

from retain.errors import ConfigError
from retain.methods import hft
from retain.methods.context import Run
from retain.methods.hft import HFT
from retain.methods.lora import LoRA
from retain.models import params


def held(model, seed=0, task=1, said=None, **settings):
    """Names of the parameters that HFT holds."""
    before = set(params.trainable(model))
    run = Run(directory=None, seed=seed, task_index=task, say=(said if said is not None else []).append)
    HFT(**settings).prepare_model(model, run)
    return before - set(params.trainable(model))


def test_of_llama_two_of_four_and_three_of_six_per_pair_of_layers():
    names = held(family_model("llama"))
    layers = [[n.rsplit(".", 2)[-2] for n in names if f"layers.{i}." in n] for i in range(4)]
    assert all(len({"q_proj", "k_proj", "v_proj", "o_proj"} & set(layer)) == 2 for layer in layers)
    assert sorted(len({"up_proj", "gate_proj", "down_proj"} & set(layer)) for layer in layers) == [1, 1, 2, 2]
    assert len(names) == 8 + 6
    assert len({tuple(sorted(layer)) for layer in layers}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_stays_and_the_rest_learns(family):
    model, said = family_model(family), []
    names = held(model, said=said)
    before = stored(model)
    take_steps(model)
    moved = {name for name, t in stored(model).items() if not torch.equal(t, before[name])}
    assert names
    assert not moved & names
    inside = {id(p) for block in params.decoder_layers(model) for p in block.parameters()}
    outer = {n for n, p in model.named_parameters() if id(p) not in inside and "position" not in n and "wpe" not in n}
    assert outer <= moved, "embeddings, head and the last norm learn"
    assert not any("norm" in name or "ln_" in name for name in names)
    assert all(name.replace(".bias", ".weight") in names for name in names), "a bias stays with its matrix"
    weights = sum(before[name].numel() for name in names)
    assert f"({weights:,} weights)" in said[0]
    assert 0.25 < weights / sum(p.numel() for b in params.decoder_layers(model) for p in b.parameters()) < 0.75


def test_the_draw_is_that_of_seed_and_task():
    first = held(family_model("llama"))
    assert held(family_model("llama")) == first
    assert held(family_model("llama"), task=2) != first
    assert held(family_model("llama"), seed=1) != first


@pytest.mark.parametrize(("share", "count"), [(0.25, 4 + 3), (0.1, 2 + 1), (1.0, 16 + 12)])
def test_other_shares_are_met_over_all_layers(share, count):
    assert len(held(family_model("llama"), share=share)) == count


def test_every_matrix_is_drawn_about_equally_often():
    found = hft.matrices(family_model("llama"))
    counts: dict[str, int] = {}
    for seed in range(400):
        for name in hft.drawn(found, 0.5, np.random.default_rng(seed)):
            counts[name] = counts.get(name, 0) + 1
    assert len(counts) == 28
    assert all(150 < count < 250 for count in counts.values())


def test_with_lora_whole_adapters_are_drawn_in_any_order_of_methods(tmp_path):
    made = train([HFT(), LoRA(r=2)], tmp_path / "one")
    factors = {n: p.requires_grad for n, p in params.causal(made.model).named_parameters() if ".lora_" in n}
    pairs: dict[str, set[bool]] = {}
    for name, learns in factors.items():
        pairs.setdefault(re.split(r"\.lora_", name)[0], set()).add(learns)
    assert all(len(learns) == 1 for learns in pairs.values())
    assert sum(learns == {False} for learns in pairs.values()) == 4 + 3
    zero = [n for n, t in stored(made.model).items() if ".lora_B" in n and not t.any()]
    assert {re.split(r"\.lora_", n)[0] for n in zero} == {n for n, learns in pairs.items() if learns == {False}}
    other = train([LoRA(r=2), HFT()], tmp_path / "two")
    assert set(params.trainable(other.model)) == set(params.trainable(made.model))


def test_only_adapted_matrices_count():
    model = LoRA(r=2, targets="qv").prepare_model(family_model("llama"), Run(directory=None))
    names = held(model)
    assert len(names) == 2 * 4, "one of q and v per layer, A and B"


def test_nothing_to_draw_and_nothing_to_train_are_errors():
    with pytest.raises(ConfigError, match=r"methods\.hft\.share: too small") as caught:
        held(family_model("llama"), share=0.01)
    assert "\n" not in str(caught.value)
    adapted = LoRA(r=2).prepare_model(family_model("llama"), Run(directory=None))
    with pytest.raises(ConfigError, match="nothing is left to train"):
        held(adapted, share=1.0)
