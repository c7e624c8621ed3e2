"""MoFO: which entries move, against the formula by hand; and that the others do not, decay included."""

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training_kit import stored, train
from transformers import TrainerCallback

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.mofo import MoFO


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).clone())
        self.bias = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))


def gradient(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def steps(model, optimizer, method, run, count):
    for step in range(count):
        for p in model.parameters():
            p.grad = gradient(p.shape, step)
        method.edit_gradients(model, run)
        optimizer.step()
        method.on_step_end(model, run)
        yield step


def run_of(optimizer, logged=None):
    log = (lambda name, value: logged.append(value)) if logged is not None else (lambda name, value: None)
    return Run(directory=None, moments=lambda p: dict(optimizer.state.get(p, {})), log=log)


def test_it_is_the_algorithm_of_the_paper():
    model, method, rate = Toy(), MoFO(share=0.3), 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    v = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in steps(model, optimizer, method, run_of(optimizer), 6):
        for name, w in weights.items():
            g = gradient(w.shape, step).numpy()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            update = rate * (m[name] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            if name == "matrix":
                update = np.where(np.abs(m[name]) >= np.sort(np.abs(m[name]).ravel())[-6], update, 0)
            weights[name] = w - update
            np.testing.assert_allclose(model.get_parameter(name).detach().numpy(), weights[name], atol=1e-12)


def test_nothing_outside_moves_by_a_bit_with_weight_decay():
    model, method = Toy(), MoFO(share=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before, run = model.matrix.detach().clone(), run_of(optimizer)
    for _ in steps(model, optimizer, method, run, 5):
        moved = model.matrix.detach() != before
        largest = optimizer.state[model.matrix]["exp_avg"].abs().flatten().topk(4).indices
        assert set(moved.flatten().nonzero()[:, 0].tolist()) == set(largest.tolist())
        before = model.matrix.detach().clone()
    assert bool((model.bias != 1).all())


def test_what_it_costs_the_new_task_is_logged():
    """In the first step of gradient descent: rate · Σ g² over what stays."""
    model, method, logged = Toy(), MoFO(share=0.25), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    list(steps(model, optimizer, method, run_of(optimizer, logged), 1))
    squares = gradient((4, 5), 0).square().flatten().sort(descending=True).values
    assert logged == [pytest.approx(float(0.1 * squares[5:].sum()))]


def test_a_matrix_without_a_gradient_stays():
    model, method = Toy(), MoFO()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = run_of(optimizer)
    model.bias.grad = torch.ones_like(model.bias)
    before = model.matrix.detach().clone()
    method.edit_gradients(model, run)
    optimizer.step()
    method.on_step_end(model, run)
    assert torch.equal(model.matrix, before)


def test_an_optimizer_without_momentum_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.mofo: the optimizer 'sgd' keeps no first moment") as caught:
        train([MoFO()], tmp_path, optim="sgd")
    assert "\n" not in str(caught.value)


class Counts(TrainerCallback):
    """How many entries of each parameter moved in every step."""

    def __init__(self):
        self.before, self.moved = {}, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = stored(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        after = stored(model)
        self.moved.append({name: int((after[name] != t).sum()) for name, t in self.before.items()})


def test_in_training_no_matrix_moves_by_more_than_its_share(tmp_path):
    counts = Counts()
    model = tiny_model(tiny_tokenizer())
    sizes = {name: (p.dim(), p.numel()) for name, p in model.named_parameters()}
    train([MoFO(share=0.1)], tmp_path, model, callbacks=[counts], weight_decay=0.1)
    assert len(counts.moved) == 4
    for moved in counts.moved:
        for name, (dim, size) in sizes.items():
            assert moved[name] == size if dim == 1 else 0 < moved[name] <= 0.1 * size
    plain = Counts()
    train([], tmp_path / "plain", callbacks=[plain], weight_decay=0.1)
    assert all(plain.moved[0][name] > 0.5 * size for name, (dim, size) in sizes.items() if dim == 2)
