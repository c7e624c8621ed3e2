"""L2-SP: the gradient of the plain distance, and a hold that no strength can make unstable."""

import pytest
import torch
from training_kit import distance, finite, stored, train, trainer

from retain.errors import ConfigError
from retain.methods.l2sp import L2SP
from retain.models import params


def test_gradient_is_strength_times_distance(tmp_path):
    made = train([L2SP(strength=0.3)], tmp_path)
    method = made.stack.methods[0]
    for p in params.trainable(made.model).values():
        p.grad = torch.zeros_like(p)
    method.edit_gradients(made.model, made.run)
    squares = 0.0
    for name, p in params.trainable(made.model).items():
        torch.testing.assert_close(p.grad, 0.3 * (p.detach() - made.run.start[name]))
        squares += float((p.detach() - made.run.start[name]).double().square().sum())
    assert squares > 0
    assert method.pull.value(0.3) == pytest.approx(0.15 * squares, rel=1e-4)


def test_one_sgd_step_is_the_formula(tmp_path, model):
    """Two steps of SGD by hand: the pull acts from the second on, unscaled by accumulation."""
    settings = {"steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    start = stored(model)
    plain_one = stored(train([], tmp_path / "one", **(settings | {"steps": 1})).model)
    plain = stored(train([], tmp_path / "two", **settings).model)
    for accumulate in (1, 2):
        folder = tmp_path / f"pull{accumulate}"
        settings |= {"batch": 4 // accumulate, "gradient_accumulation_steps": accumulate}
        held = stored(train([L2SP(strength=2.0)], folder, **settings).model)
        wanted = {name: plain[name] - 0.01 * 2.0 * (plain_one[name] - start[name]) for name in start}
        assert distance(held, wanted) < 1e-6
        assert distance(held, plain) > 1e-5


def test_stronger_is_nearer(tmp_path, model):
    start = stored(model)
    for form in ("gradient", "proximal"):
        moved = [
            sum(
                float((t - start[n]).square().sum())
                for n, t in stored(train([L2SP(strength=s, form=form)], tmp_path / f"{form}{s}").model).items()
            )
            for s in (0.0, 3.0, 50.0)
        ]
        assert moved[0] > moved[1] > moved[2]


def test_proximal_at_a_huge_strength_keeps_the_start(tmp_path, model):
    start = stored(model)
    made = train([L2SP(strength=1e12, form="proximal")], tmp_path)
    assert finite(made.model)
    assert distance(stored(made.model), start) < 1e-6


def test_too_stiff_for_sgd_is_an_error_and_proximal_is_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.l2sp\.strength: .*form: proximal") as caught:
        train([L2SP(strength=1000.0)], tmp_path, optim="sgd")
    assert "\n" not in str(caught.value)
    assert finite(train([L2SP(strength=1000.0, form="proximal")], tmp_path, optim="sgd").model)


def test_adam_is_only_warned(tmp_path):
    made = trainer([L2SP(strength=1000.0)], tmp_path)
    said = []
    made.run.say = said.append
    made.train()
    assert any("stiff" in line for line in said)
