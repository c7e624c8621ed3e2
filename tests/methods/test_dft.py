"""DFT: the gradient of −p, whatever the head."""

import pytest
import torch
from families import family_model
from training_kit import train
from weighing_kit import dense_logits, labelled, run_of, targets, tokens_of, weighted_gradients

from retain.methods.dft import DFT
from retain.models import params


def own(model, ids, labels, **settings):
    method, run = DFT(**settings), run_of(model)
    method.on_task_start(model, run)
    return method.token_weights(tokens_of(model, ids, labels), run)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "cohere"])
def test_gradient_is_that_of_minus_the_probability(kind):
    model = family_model(kind).double()
    ids, labels = labelled()
    weighted = weighted_gradients(model, own(model, ids, labels), ids, labels)
    p = torch.softmax(dense_logits(model, ids, labels), -1).gather(1, targets(labels)[:, None])
    learning = params.trainable(model)
    wanted = torch.autograd.grad(-p.sum(), list(learning.values()))
    assert max(float(slope.abs().max()) for slope in wanted) > 1e-3
    for name, slope in zip(learning, wanted):
        torch.testing.assert_close(weighted[name], slope, rtol=1e-7, atol=1e-12, msg=name)


def test_all_tokens_weigh_alike_for_a_model_that_knows_nothing():
    model = family_model("llama").double()
    ids, labels = labelled()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    even = own(model, ids, labels)
    torch.testing.assert_close(even, torch.full_like(even, 1 / 90))


def test_the_log_shows_the_mean_probability(tmp_path):
    made = train([DFT()], tmp_path, steps=3, learning_rate=1e-9)
    lines = [line for line in made.state.log_history if "dft/weight" in line]
    assert len(lines) == 3
    assert all(0 < line["dft/weight"] < 1 for line in lines)
