"""EAFT: the entropy of the likeliest tokens as the weight, by sorting whole distributions."""

import math

import numpy as np
import pytest
import torch
from families import family_model
from pydantic import ValidationError
from training_kit import train
from weighing_kit import dense_logits, labelled, run_of, tokens_of

from retain.errors import ConfigError
from retain.methods.eaft import EAFT


def own(model, ids, labels, **settings):
    method, run = EAFT(**settings), run_of(model)
    method.on_task_start(model, run)
    return method.token_weights(tokens_of(model, ids, labels), run)


@pytest.mark.parametrize("k", [2, 20])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_weight_is_the_entropy_of_the_top_over_its_largest_value(kind, k):
    model = family_model(kind).double()
    ids, labels = labelled()
    with torch.no_grad():
        logits = dense_logits(model, ids, labels).numpy()
    top = np.exp(np.sort(logits, axis=1)[:, -k:])
    p = top / top.sum(1, keepdims=True)
    wanted = -(p * np.log(p)).sum(1) / math.log(k)
    found = own(model, ids, labels, k=k)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    assert found.std() > 1e-3


def test_a_model_that_knows_nothing_learns_everything_and_a_sure_one_nothing():
    model = family_model("gpt_neox").double()
    ids, labels = labelled()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert own(model, ids, labels).min() > 1 - 1e-12
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.gpt_neox.final_layer_norm.bias.fill_(1.0)
        model.lm_head.weight[5] = 5.0  # one token 160 nats above the rest, whatever the text
    assert own(model, ids, labels).max() < 1e-12


def test_a_confident_conflict_weighs_less_than_an_open_place():
    """Of two labels of the same probability, the one at the surer place is learned less; DFT cannot tell them."""
    model = family_model("llama").double()
    ids, labels = labelled(8, 12)
    found = own(model, ids, labels)
    entropy = tokens_of(model, ids, labels).scores[1]
    sure, open_ = entropy.argmin(), entropy.argmax()
    assert found[sure] < 0.8 * found[open_]
    assert np.corrcoef(found.numpy(), entropy.numpy())[0, 1] > 0.9


def test_the_label_has_no_part_in_it():
    model = family_model("llama").double()
    ids, labels = labelled()
    other = torch.where(labels == -100, labels, (labels + 11) % 90)
    torch.testing.assert_close(own(model, ids, labels), own(model, ids, other))


def test_in_training(tmp_path):
    made = train([EAFT()], tmp_path, steps=3, learning_rate=1e-9)
    shares = [line["eaft/weight"] for line in made.state.log_history if "eaft/weight" in line]
    assert len(shares) == 3
    assert all(0 < share < 1 for share in shares)


def test_settings():
    with pytest.raises((ConfigError, ValidationError), match="k"):
        EAFT(k=1)
