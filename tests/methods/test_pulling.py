"""What l2sp, ewc, mas and si share: both forms of the pull, and its strength over task, layers and names."""

import copy

import pytest
import torch
from training_kit import distance, finite, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods import load
from retain.methods.base import Stack
from retain.methods.ewc import EWC
from retain.methods.l2sp import L2SP
from retain.methods.lora import LoRA
from retain.models import params

NAMES = ["l2sp", "ewc", "mas", "si"]
FEW = {"ewc": {"samples": 4}, "mas": {"samples": 4}}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def make(name, **settings):
    return load(name)(**(FEW.get(name, {}) | settings))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=["dense", "lora"])
def first(request):
    """Methods that come before the pull."""
    return [LoRA(r=3)] if request.param == "lora" else []


def one_step(made, method, form, rate, slopes, at):
    """The weights after one step of SGD from `at` with the method's pull in a form (None: no pull)."""
    learning = params.trainable(made.model)
    method.config = method.config.model_copy(update={"form": form or "gradient"})
    made.run.learning_rate, made.run.logging_now = rate, False
    with torch.no_grad():
        for n, p in learning.items():
            p.copy_(at[n])
            p.grad = slopes[n].clone()
    if form is not None:
        method.edit_gradients(made.model, made.run)
    with torch.no_grad():
        for p in learning.values():
            p -= rate * p.grad
    if form is not None:
        method.on_step_end(made.model, made.run)
    return {n: p.detach().clone() for n, p in learning.items()}


def test_both_forms_agree_to_first_order_under_sgd(name, first, tmp_path, model):
    """Their difference falls with the square of the learning rate, what the pull does with the rate itself."""
    made = train([*first, make(name)], tmp_path, model.double())
    method, learning = made.stack.methods[-1], params.trainable(made.model)
    at = {n: p.detach().clone() for n, p in learning.items()}
    torch.manual_seed(0)
    slopes = {n: 0.01 * torch.randn_like(p) for n, p in learning.items()}
    # whatever the importance is, the larger rate makes the stiffest weight move by a thousandth of its way back
    unit = 1e-3 / method.pull.stiffness(method.strength(made.run), 1.0)
    apart, moved = [], []
    for rate in (unit, unit / 10):
        free, added, implicit = (
            one_step(made, method, form, rate, slopes, at) for form in (None, "gradient", "proximal")
        )
        apart.append(distance(added, implicit))
        moved.append(distance(added, free))
    assert moved[0] == pytest.approx(10 * moved[1], rel=0.05)
    assert apart[0] == pytest.approx(100 * apart[1], rel=0.25)
    assert 0 < apart[1] < 0.05 * moved[1]


def test_the_proximal_form_is_stable_at_any_strength(name, first, tmp_path, model):
    with pytest.raises(ConfigError, match=rf"methods\.{name}\.strength: .*form: proximal"):
        train([*first, make(name, strength=1e9)], tmp_path / "gradient", copy.deepcopy(model), **SGD)
    free, held = (
        train([*first, make(name, strength=s, form="proximal")], tmp_path / str(s), copy.deepcopy(model), **SGD)
        for s in (1e-9, 1e9)
    )
    assert finite(held.model)
    away = free.stack.methods[-1].pull.value(1.0)
    assert away > 0
    assert held.stack.methods[-1].pull.value(1.0) < 1e-4 * away


def test_strength_has_its_bound_in_every_method(name):
    for settings in ({"strength": -0.1}, {"end": -1.0}, {"by_layer": [1.0]}, {"by_layer": [1.0, -1.0]}):
        with pytest.raises(ConfigError, match=rf"methods\.{name}\.{next(iter(settings))}") as caught:
            load(name)(**settings)
        assert "\n" not in str(caught.value)


# -- over the task -----------------------------------------------------------------------------------------
def test_the_strength_follows_its_schedule(name, tmp_path):
    settings = {"strength": 2.0, "schedule": "linear", "end": 0.0}
    made = train([make(name, **settings)], tmp_path, steps=4)
    shown = [line[f"{name}/strength"] for line in made.state.log_history if f"{name}/strength" in line]
    assert shown == pytest.approx([2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_the_pull_of_a_step_has_the_strength_of_that_step(form, tmp_path, model):
    """Off after half of the task: the same weights as one that is killed by a strength of 0 there."""
    settings = {"strength": 0.7, "form": form}
    seen = []

    class Watched(L2SP):
        name = "l2sp"

        def strength(self, run):
            seen.append((run.step, super().strength(run)))
            return seen[-1][1]

    halved = {"schedule": "custom", "expression": "max(0, 1 - 2 * t) ** 0"}  # 1 all along
    plain = stored(train([L2SP(**settings)], tmp_path / "a", copy.deepcopy(model)).model)
    custom = stored(train([Watched(**settings, **halved)], tmp_path / "b", copy.deepcopy(model)).model)
    assert same_bits(plain, custom)
    assert dict(seen) == dict.fromkeys(range(4), 0.7)
    rising = stored(train([L2SP(schedule="rising", strength=0.0, end=0.7, form=form)], tmp_path / "c", model).model)
    assert distance(rising, plain) > 1e-5


def test_a_pull_that_rises_from_nothing_is_not_off(name):
    assert make(name, strength=0.0, schedule="rising", end=1.0).active
    assert not make(name, strength=0.0).active


def test_bad_schedules_are_one_line_before_anything_is_loaded(name):
    for settings in (
        {"schedule": "custom"},
        {"end": 2.0},
        {"schedule": "custom", "expression": "t - 1"},
        {"schedule": "linear", "expression": "t"},
    ):
        with pytest.raises(ConfigError, match=rf"^methods\.{name}\.schedule: ") as caught:
            Stack([make(name, **settings)]).check_needs(frozenset())
        assert "\n" not in str(caught.value)


def test_the_largest_strength_of_a_schedule_must_be_followed(tmp_path):
    calm = {"strength": 1.0, "schedule": "rising"}
    train([L2SP(**calm, end=10.0)], tmp_path / "a", **SGD)
    with pytest.raises(ConfigError, match=r"methods\.l2sp\.strength"):
        train([L2SP(**calm, end=1000.0)], tmp_path / "b", **SGD)


# -- over layers and names ---------------------------------------------------------------------------------
def test_the_gradient_has_the_factor_of_layer_and_name(name, tmp_path):
    made = train([make(name, strength=0.5, by_layer=[3.0, 1.0], patterns={"mlp": 0.5, "up_proj": 4.0})], tmp_path)
    method = made.stack.methods[0]
    importance = getattr(method, "_importance", None)
    for p in params.trainable(made.model).values():
        p.grad = torch.zeros_like(p)
    method.edit_gradients(made.model, made.run)
    value = 0.0
    for n, p in params.trainable(made.model).items():
        factor = 3.0 if "embed_tokens" in n or "layers.0" in n else 1.0
        factor *= (0.5 if "mlp" in n else 1.0) * (4.0 if "up_proj" in n else 1.0)
        f = 1.0 if importance is None else importance[n]
        away = p.detach() - made.run.start[n]
        torch.testing.assert_close(p.grad, 0.5 * factor * f * away)
        value += 0.25 * factor * float((f * away.square()).double().sum())
    assert value > 0
    assert method.pull.value(0.5) == pytest.approx(value, rel=1e-4)


def test_adapted_layers_have_factors_too(tmp_path):
    made = train([LoRA(r=3), EWC(samples=4, by_layer=[3.0, 1.0], patterns={"q_proj": 0.0})], tmp_path)
    plain = train([LoRA(r=3), EWC(samples=4)], tmp_path / "plain")
    method, other = made.stack.methods[-1], plain.stack.methods[-1]
    held = {pair.name: f for pair, f in zip(method.pull.pairs, method.pull._factors_pairs)}
    assert {n for n in held if "q_proj" in n} == set()
    assert held
    assert all(f == (3.0 if "layers.0" in n else 1.0) for n, f in held.items())
    assert len(other.pull.pairs) == len(params.lora_pairs(plain.model)) > len(held)
    # the gradient of a pair is that of the plain pull times its factor
    names = {id(p): n for n, p in params.trainable(made.model).items()}
    plain_of = params.trainable(plain.model)
    with torch.no_grad():
        for n, p in params.trainable(made.model).items():
            plain_of[n].copy_(p)
            p.grad, plain_of[n].grad = torch.zeros_like(p), torch.zeros_like(p)
    method.pull.add_gradients(1.0)
    other.pull.add_gradients(1.0)
    for n, pair in params.lora_pairs(made.model).items():
        for p in (pair.A, pair.B):
            torch.testing.assert_close(p.grad, held.get(n, 0.0) * plain_of[names[id(p)]].grad)


def test_true_holds_the_bottom_harder(tmp_path):
    made = trainer([L2SP(by_layer=True)], tmp_path, steps=1)
    made.train()
    pull = made.stack.methods[0].pull
    factors = dict(zip(params.trainable(made.model), pull._factors_dense))
    assert factors["model.layers.0.mlp.up_proj.weight"] == factors["model.embed_tokens.weight"] == 2.0
    assert factors["model.layers.1.mlp.up_proj.weight"] == factors["model.norm.weight"] == 0.5


def test_patterns_without_effect_are_errors(name, tmp_path):
    for patterns, text in (
        ({"no_such_part": 2.0}, "matches nothing that is trained. Names look like 'model"),
        ({"(": 2.0}, "not a regular expression"),
        ({"mlp": -1.0}, "allowed: a finite number ≥ 0"),
        ({"": 0.0}, "no trainable weight to hold"),
    ):
        with pytest.raises(ConfigError, match=rf"methods\.{name}.*{text}") as caught:
            train([make(name, patterns=patterns)], tmp_path, train_rows=rows(4))
        assert "\n" not in str(caught.value)
