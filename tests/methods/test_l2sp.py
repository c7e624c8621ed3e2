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


@pytest.mark.parametrize("rate", [1e-2, 1e-4])
def test_a_proximal_pull_that_is_found_begins_where_a_strong_hold_begins(tmp_path, rate):
    """Learning rate · strength · steps is one, whatever the rate; a schedule and a strength that is given stay."""
    settings = {"steps": 5, "learning_rate": rate, "lr_scheduler_type": "constant"}
    made = train([L2SP(strength="auto", form="proximal", schedule="rising", end=0.2)], tmp_path / "auto", **settings)
    method = made.stack.methods[0]
    method.boost, made.run.step = 1.0, 0
    assert rate * method.strength(made.run) * 5 == pytest.approx(1)
    made.run.step = 5
    assert rate * method.strength(made.run) * 5 == pytest.approx(2), "from the usual 0.1 to 0.2"
    for given in ({"strength": 3.0, "form": "proximal"}, {"strength": 3.0}):
        fixed = train([L2SP(**given)], tmp_path / given.get("form", "gradient"), **settings)
        assert fixed.stack.methods[0].strength(fixed.run) == 3.0
