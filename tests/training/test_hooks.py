"""Hooks of the protocol through the trainer: token weights, learning rates, and the batches of a step."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training_kit import distance, rows, stored, train

from retain.methods.base import Method
from retain.methods.context import answer_loss
from retain.methods.weighing import Weighing
from retain.models import params


class Even(Method):
    """Every token weighs the same."""

    name = "even"
    factor = 1.0

    def token_weights(self, tokens, run):
        assert tokens.rows.max() < len(tokens.batch.labels)
        return torch.full((len(tokens.labels),), self.factor, dtype=tokens.hidden.dtype)


class Double(Even):
    """Every token weighs twice."""

    name = "double"
    factor = 2.0


class Confident(Weighing):
    """Weighs by the label's probability."""

    name = "confident"

    def weigh(self, tokens, run):
        return tokens.scores[0].exp()


class Slow(Method):
    """A tenth of the learning rate for the norms, none for the embeddings."""

    name = "slow"

    def learning_rates(self, model, run):
        return {n: 0.0 if "embed" in n else 0.1 for n in params.trainable(model) if "embed" in n or "norm" in n}


class Again(Method):
    """Computes the step's gradient once more, with plain autograd."""

    name = "again"
    repeats_batches = True
    edits_gradients = True

    def edit_gradients(self, model, run):
        mine = params.trainable(model)
        total = sum(answer_loss(model, b.inputs, b.labels) for b in run.step_batches) / run.step_tokens
        again = torch.autograd.grad(total, list(mine.values()), allow_unused=True)
        for parameter, gradient in zip(mine.values(), again):
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)  # float32 sums of the host
        self.parts = [*getattr(self, "parts", []), len(run.step_batches)]


def double():
    return tiny_model(tiny_tokenizer()).double()


def test_even_weights_are_plain_training(tmp_path):
    settings = {"optim": "sgd", "max_grad_norm": 0}
    plain = train([], tmp_path / "a", double(), **settings)
    even = train([Even()], tmp_path / "b", double(), **settings)
    assert distance(stored(plain.model), stored(even.model)) < 1e-7  # the host's head adds up in float32
    twice = train([Double()], tmp_path / "c", double(), **settings)
    fast = train([], tmp_path / "d", double(), **settings | {"learning_rate": 2e-2})
    assert distance(stored(twice.model), stored(fast.model)) < 1e-7
    assert distance(stored(twice.model), stored(plain.model)) > 1e-4


def test_weights_of_two_methods_are_multiplied(tmp_path):
    both = train([Double(), Even()], tmp_path / "a", double())
    one = train([Double()], tmp_path / "b", double())
    assert distance(stored(both.model), stored(one.model)) < 1e-9


def test_weights_do_not_depend_on_accumulation_and_have_mean_one(tmp_path):
    settings = {"train_rows": rows(24), "steps": 6}
    whole = train([Confident()], tmp_path / "a", double(), batch=4, **settings)
    split = train([Confident()], tmp_path / "b", double(), batch=1, gradient_accumulation_steps=4, **settings)
    assert distance(stored(whole.model), stored(split.model)) < 1e-6
    raw = train([Confident(normalise=False)], tmp_path / "c", double(), batch=4, **settings)
    first, *later = (e["loss/main"] for e in whole.state.log_history if "loss/main" in e)
    small, *_ = (e["loss/main"] for e in raw.state.log_history if "loss/main" in e)
    assert first == pytest.approx(small)  # nothing is known before the first step
    assert later[0] > 2 * small


def test_learning_rates_by_name(tmp_path):
    model = double()
    before = stored(model)
    made = train([Slow()], tmp_path, model)
    after = stored(made.model)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    rates = {
        name: group["lr"]
        for group in made.optimizer.param_groups
        for name, p in params.trainable(made.model).items()
        if any(p is q for q in group["params"])
    }
    assert rates.keys() == params.trainable(made.model).keys()
    base = max(g["initial_lr"] for g in made.optimizer.param_groups)
    norms = {g["initial_lr"] for g in made.optimizer.param_groups} - {base, 0.0}
    assert sorted(norms) == [pytest.approx(base / 10)]


@pytest.mark.parametrize(("batch", "parts"), [(4, 1), (2, 2)])
def test_a_step_can_be_run_again(tmp_path, batch, parts):
    method = Again()
    train([method], tmp_path, double(), batch=batch, gradient_accumulation_steps=parts, steps=3)
    assert method.parts == [parts] * 3
