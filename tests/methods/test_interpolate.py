"""Interpolation: exact ends, a straight line between them, the same line with LoRA."""

import pytest
import torch
from training_kit import distance, merged, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods.interpolate import Interpolate
from retain.methods.lora import LoRA


def test_the_ends_are_exact(tmp_path, model):
    start = stored(model)
    plain = stored(train([], tmp_path / "plain").model)
    assert same_bits(stored(train([Interpolate(strength=0.0)], tmp_path / "end").model), plain)
    assert same_bits(stored(train([Interpolate(strength=1.0)], tmp_path / "start").model), start)


def test_linear_between_the_ends(tmp_path, model):
    start = stored(model)
    plain = stored(train([], tmp_path / "plain").model)
    assert distance(start, plain) > 1e-3
    for strength in (0.25, 0.7):
        found = stored(train([Interpolate(strength=strength)], tmp_path / str(strength)).model)
        wanted = {name: strength * start[name] + (1 - strength) * plain[name] for name in start}
        assert distance(found, wanted) < 1e-6


def test_with_lora_it_is_the_dense_interpolation(tmp_path, model):
    start = stored(model)
    plain = merged(train([LoRA(r=4)], tmp_path / "plain").model)
    assert distance(start, plain) > 1e-3
    for strength in (0.3, 1.0):
        found = merged(train([LoRA(r=4), Interpolate(strength=strength)], tmp_path / str(strength)).model)
        wanted = {name: strength * start[name] + (1 - strength) * plain[name] for name in start}
        assert distance(found, wanted) < 1e-6


def test_tied_embeddings_move_once(tmp_path, tokenizer):
    from tiny import tiny_model

    start = stored(tiny_model(tokenizer, tie_word_embeddings=True))
    plain = stored(train([], tmp_path / "plain", tiny_model(tokenizer, tie_word_embeddings=True)).model)
    made = train([Interpolate(strength=0.5)], tmp_path / "half", tiny_model(tokenizer, tie_word_embeddings=True))
    assert made.model.get_input_embeddings().weight is made.model.get_output_embeddings().weight
    assert distance(stored(made.model), {n: (start[n] + plain[n]) / 2 for n in start}) < 1e-6


def test_half_precision_weights_keep_their_type_and_their_start(tmp_path, model):
    model = model.to(torch.bfloat16)
    start = stored(model)
    made = train([Interpolate(strength=1.0)], tmp_path, model)
    assert same_bits(stored(made.model), start)


def test_an_adapter_that_did_not_start_at_zero_is_refused(tmp_path, model):
    from peft import LoraConfig, get_peft_model

    moved = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(ConfigError, match="did not start at zero"):
        train([Interpolate(strength=0.5)], tmp_path, moved)


def test_dora_is_refused_before_training(tmp_path):
    """With DoRA the weights are not linear in B, so scaling B is not the dense interpolation."""
    made = trainer([LoRA(r=2, dora=True), Interpolate(strength=0.5)], tmp_path)
    with pytest.raises(ConfigError, match="dora: false"):
        made.train()
    assert made.seen == []
