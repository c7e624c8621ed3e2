"""The pull: its gradient is strength·F·(θ − θ*), for LoRA that of the dense product."""

import copy

import pytest
import torch
from families import family_model, take_steps
from torch.utils._python_dispatch import TorchDispatchMode

from retain.functional import penalties
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.pull import Pull, _implicit, product_keys

STRENGTH = 0.7


def moved(model):
    """The model after a little training, in float64, and where its weights were before."""
    model = model.double()
    start = params.snapshot(params.trainable(model))
    take_steps(model, 3)
    return model, start


def random_importance(model, seed=0):
    torch.manual_seed(seed)
    found = {name: torch.rand_like(p) for name, p in params.outside_lora(model).items()}
    for name, pair in params.lora_pairs(model).items():
        rows, columns = torch.rand(pair.B.shape[0]).double(), torch.rand(pair.A.shape[1]).double()
        found |= dict(zip(product_keys(name), (rows, columns * rows.sum() / columns.sum())))
    return found


def gradients(model, pull):
    """What the pull adds to gradients that are 0."""
    learning = params.trainable(model)
    for p in learning.values():
        p.grad = torch.zeros_like(p)
    pull.add_gradients(STRENGTH)
    return {name: p.grad.clone() for name, p in learning.items()}


@pytest.fixture
def dense():
    return moved(family_model("llama"))


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request):
    return moved(LoRA(r=3, alpha=5).prepare_model(family_model(request.param), Run(directory=None)))


def test_dense_gradient_is_the_formula(dense):
    model, start = dense
    importance = random_importance(model)
    found = gradients(model, Pull(model, start, importance))
    for name, p in params.trainable(model).items():
        torch.testing.assert_close(found[name], STRENGTH * importance[name] * (p.detach() - start[name]))


def test_gradient_is_added_to_what_is_there(dense):
    model, start = dense
    pull = Pull(model, start)
    for p in params.trainable(model).values():
        p.grad = torch.ones_like(p)
    pull.add_gradients(STRENGTH)
    for name, p in params.trainable(model).items():
        torch.testing.assert_close(p.grad, 1 + STRENGTH * (p.detach() - start[name]))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_is_the_slope_of_the_value(kind, rank):
    model = family_model(kind)
    model, start = moved(LoRA(r=rank).prepare_model(model, Run(directory=None)) if rank else model)
    pull = Pull(model, start, random_importance(model))
    found = gradients(model, pull)
    torch.manual_seed(3)
    direction = {name: torch.randn_like(p) for name, p in params.trainable(model).items()}

    def value(step):
        with torch.no_grad():
            for name, p in params.trainable(model).items():
                p.add_(step * direction[name])
            result = pull.value(STRENGTH)
            for name, p in params.trainable(model).items():
                p.sub_(step * direction[name])
        return result

    slope = sum(float((found[name] * direction[name]).sum()) for name in found)
    h = 1e-3  # this difference is exact for polynomials of degree four, as the penalty on a product is
    difference = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert difference == pytest.approx(slope, rel=1e-6)


def test_lora_is_the_dense_penalty_on_the_product(adapted):
    """Value and gradients of ½ λ Σ F̂ ⊙ (s·BA)² with F̂ = r cᵀ / Σr, by autograd on whole matrices."""
    model, start = adapted
    importance = random_importance(model)
    pull = Pull(model, start, importance)
    found = gradients(model, pull)
    total = 0.0
    names = {id(p): name for name, p in params.trainable(model).items()}
    for name, pair in params.lora_pairs(model).items():
        rows, columns = (importance[key] for key in product_keys(name))
        weights = torch.outer(rows, columns) / rows.sum()
        b, a = pair.B.detach().clone().requires_grad_(), pair.A.detach().clone().requires_grad_()
        penalty = 0.5 * STRENGTH * (weights * (pair.scaling * b @ a).square()).sum()
        penalty.backward()
        total += float(penalty.detach())
        torch.testing.assert_close(found[names[id(pair.B)]], b.grad)
        torch.testing.assert_close(found[names[id(pair.A)]], a.grad)
        assert b.grad.abs().max() > 0
    assert pull.value(STRENGTH) == pytest.approx(total, rel=1e-6)


def test_lora_with_a_moved_anchor_pulls_to_the_anchor(adapted):
    model, _ = adapted
    start = params.snapshot(params.trainable(model))
    pull = Pull(model, start)
    assert pull.value(STRENGTH) == 0
    assert all(not g.any() for g in gradients(model, pull).values())
    pairs = params.lora_pairs(model)
    before = {name: (pair.scaling * pair.B @ pair.A).detach() for name, pair in pairs.items()}
    take_steps(model, 2)
    dense = sum(
        0.5 * STRENGTH * float((pair.scaling * pair.B @ pair.A - before[name]).detach().square().sum())
        for name, pair in pairs.items()
    )
    assert dense > 0
    assert pull.value(STRENGTH) == pytest.approx(dense, rel=1e-6)


def test_importance_of_one_is_no_importance(dense, adapted):
    for model, start in (dense, adapted):
        ones = {name: torch.ones_like(p) for name, p in params.outside_lora(model).items()}
        for name, pair in params.lora_pairs(model).items():
            out, into = pair.B.shape[0], pair.A.shape[1]
            # row sums of an all-ones matrix [out, in] are `in`, column sums are `out`
            ones |= dict(zip(product_keys(name), (torch.full((out,), float(into)), torch.full((into,), float(out)))))
        weighted, plain = gradients(model, Pull(model, start, ones)), gradients(model, Pull(model, start))
        for name in plain:
            torch.testing.assert_close(weighted[name], plain[name])
            assert plain[name].any()


def test_the_start_has_no_pull_at_all():
    model = family_model("llama").double()
    pull = Pull(model, params.snapshot(params.trainable(model)), random_importance(model))
    assert pull.value(1e6) == 0
    assert all(not g.any() for g in gradients(model, pull).values())


def test_the_proximal_step_is_the_closed_form_at_any_strength(dense):
    model, start = dense
    importance = random_importance(model)
    for strength in (0.1, 1e12):
        other = copy.deepcopy(model)
        before = params.snapshot(params.trainable(other))
        Pull(other, start, importance).step(strength, 0.01)
        for name, p in params.trainable(other).items():
            stiff = 0.01 * strength * importance[name]
            wanted = (before[name] + stiff * start[name]) / (1 + stiff)
            torch.testing.assert_close(p.detach(), wanted)
    worst = max(float((p.detach() - start[name]).abs().max()) for name, p in params.trainable(other).items())
    assert worst < 1e-3  # 1e12: back at the anchor


def test_only_named_weights_are_pulled(dense):
    model, start = dense
    chosen = {"model.norm.weight": torch.ones(32).double()}
    pull = Pull(model, start, chosen)
    assert pull.protected == 32
    found = gradients(model, pull)
    assert {name for name, g in found.items() if g.any()} == {"model.norm.weight"}


def test_protected_counts_the_adapted_weights(adapted):
    model, start = adapted
    bases = sum(pair.base.numel() for pair in params.lora_pairs(model).values())
    assert Pull(model, start).protected == bases


def test_half_precision_weights_keep_a_full_precision_anchor():
    model = family_model("llama").to(torch.bfloat16)
    start = params.snapshot(params.trainable(model))
    assert {t.dtype for t in start.values()} == {torch.float32}
    take_steps(model)
    for p in params.trainable(model).values():
        p.grad = torch.zeros_like(p)
    Pull(model, start).add_gradients(1.0)
    for name, p in params.trainable(model).items():
        torch.testing.assert_close(p.grad.float(), p.detach().float() - start[name], rtol=1e-2, atol=1e-5)


def test_stiffness_is_the_largest_product(dense):
    model, start = dense
    importance = random_importance(model)
    largest = max(float(f.max()) for f in importance.values())
    assert Pull(model, start, importance).stiffness(4.0, 0.5) == pytest.approx(2 * largest)


def by_gradient_descent(objective, *factors):
    """Minimise by Newton steps of autograd, one factor after the other: slow and independent."""
    done = []
    for i in range(len(factors)):
        variable = factors[i].clone().requires_grad_()

        def value(x, i=i):
            return objective(*[x if j == i else (done[j] if j < i else factors[j]) for j in range(len(factors))], i)

        (slope,) = torch.autograd.grad(value(variable), variable)
        size = variable.numel()
        curvature = torch.autograd.functional.hessian(value, variable.detach()).reshape(size, size)
        done.append(variable.detach() - torch.linalg.solve(curvature, slope.reshape(-1)).reshape(variable.shape))
    return done


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("rate", [0.01, 5.0])
def test_the_implicit_step_on_a_product_is_the_minimiser(rate, anchored):
    torch.manual_seed(0)
    b, a = torch.randn(5, 2).double(), torch.randn(2, 4).double()
    b0, a0 = (torch.randn(5, 2).double(), torch.randn(2, 4).double()) if anchored else (None, None)
    rows, columns = torch.rand(5).double() + 0.1, torch.rand(4).double() + 0.1
    anchor = b0 @ a0 if anchored else torch.zeros(5, 4).double()
    weights = torch.outer(rows, columns) / rows.sum()

    def objective(left, right, which):
        near = ((left - b) if which == 0 else (right - a)).square().sum() / 2
        return near + 0.5 * rate * 4.0 * (weights * (left @ right - anchor).square()).sum()

    wanted = by_gradient_descent(objective, b, a)
    factor = penalties.LowRank(b, a, b0, a0, scale=2.0, rows=rows, columns=columns)
    for found, truth in zip(_implicit(factor, rate), wanted):
        torch.testing.assert_close(found, truth)


def test_a_small_implicit_step_is_the_gradient(adapted):
    model, start = adapted
    pull = Pull(model, start, random_importance(model))
    slopes = gradients(model, pull)
    before = params.snapshot(params.trainable(model))
    pull.step(STRENGTH, 1e-6)
    for name, p in params.trainable(model).items():
        torch.testing.assert_close((before[name] - p.detach()) / 1e-6, slopes[name], rtol=1e-3, atol=1e-8)


def test_lora_steps_of_any_strength_bring_the_product_back(adapted):
    model, start = adapted
    pull = Pull(model, start, random_importance(model))
    before = pull.value(1.0)
    assert before > 0
    for strength in (1.0, 1e3, 1e12):
        pull.step(strength, 0.01)
        assert pull.value(1.0) < before
        before = pull.value(1.0)
    assert before < 1e-12
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_stiffness_of_a_product_is_where_descent_diverges():
    """On B alone, from the start: just below 2 it shrinks, just above it grows."""
    model = LoRA(r=3).prepare_model(family_model("llama").double(), Run(directory=None))
    start = params.snapshot(params.trainable(model))
    importance = random_importance(model)
    unit = Pull(model, start, importance).stiffness(1.0, 1.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for pair in params.lora_pairs(model).values():
            pair.B.normal_()
    pairs = params.lora_pairs(model)
    for stiff, grows in ((1.9, False), (2.1, True)):
        sizes = []
        for name, pair in pairs.items():
            rows, columns = (importance[key] for key in product_keys(name))
            b = pair.B.detach().clone()
            for _ in range(400):
                factor = penalties.LowRank(b, pair.A.detach(), scale=pair.scaling, rows=rows, columns=columns)
                b = b - stiff / unit * penalties.low_rank_gradients([factor], 1.0)[0][0]
            sizes.append(float(b.abs().max()))
        assert (max(sizes) > 1e3) == grows


def test_where_b_is_zero_nothing_pulls_and_both_factors_are_held_once_it_moves():
    """A Fisher of the factors would protect nothing of A, which has no gradient while B = 0."""
    model = LoRA(r=3).prepare_model(family_model("llama").double(), Run(directory=None, say=lambda line: None))
    pull = Pull(model, params.snapshot(params.trainable(model)), random_importance(model))
    assert pull.value(STRENGTH) == 0
    assert not any(g.any() for g in gradients(model, pull).values())
    torch.manual_seed(2)
    with torch.no_grad():
        for pair in params.lora_pairs(model).values():
            pair.B.normal_(std=0.1)
    assert pull.value(STRENGTH) > 0
    assert all(g.any() for g in gradients(model, pull).values())


def test_after_a_merge_nothing_pulls(adapted):
    model, start = adapted
    importance = random_importance(model)
    assert Pull(model, start, importance).value(STRENGTH) > 0
    merged = LoRA(r=3).prepare_model(model.merge_and_unload(), Run(directory=None, say=lambda line: None)).double()
    again = Pull(merged, params.snapshot(params.trainable(merged)), importance)
    assert again.pairs
    assert again.value(STRENGTH) == 0
    assert not any(g.any() for g in gradients(merged, again).values())


class Sizes(TorchDispatchMode):
    """Remembers the size of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for entry in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(entry, torch.Tensor):
                self.seen.append(entry.numel())
        return made


def test_the_pull_of_a_product_never_forms_it(adapted):
    model, start = adapted
    pull = Pull(model, start, random_importance(model))
    smallest = min(pair.B.shape[0] * pair.A.shape[1] for pair in pull.pairs)
    widest = max(p.numel() for pair in pull.pairs for p in (pair.A, pair.B))
    assert 2 * widest < smallest, "or nothing is tested"
    for p in params.trainable(model).values():
        p.grad = torch.zeros_like(p)
    with Sizes() as sizes:
        assert pull.add_gradients(STRENGTH, value=True) > 0
        assert pull.value(STRENGTH) > 0
        assert pull.stiffness(STRENGTH, 1.0) > 0
        pull.step(STRENGTH, 0.1)
    assert len(sizes.seen) > 100
    assert max(sizes.seen) <= 2 * widest
    with Sizes() as sizes:  # the spy does see one
        pair = pull.pairs[0]
        (pair.B @ pair.A).sum()
    assert max(sizes.seen) >= smallest


def test_factors_multiply_the_strength_and_zero_is_left_out(dense, adapted):
    for model, start in (dense, adapted):
        importance = random_importance(model)
        pulled = [*params.outside_lora(model), *params.lora_pairs(model)]
        factors = {name: float(i % 3) for i, name in enumerate(pulled)}
        whole = Pull(model, start, importance, factors)
        kept = {k: f for k, f in importance.items() if factors[k.removesuffix(".rows").removesuffix(".columns")]}
        # r and c are sums of one F, so what multiplies F multiplies both
        scaled = {k: f * factors[k.removesuffix(".rows").removesuffix(".columns")] for k, f in kept.items()}
        other = Pull(model, start, scaled)
        assert whole.protected == other.protected
        one, two = gradients(model, whole), gradients(model, other)
        for name in one:
            torch.testing.assert_close(one[name], two[name])
        assert whole.value(STRENGTH) == pytest.approx(other.value(STRENGTH), rel=1e-9)
        assert whole.stiffness(2.0, 0.5) == pytest.approx(other.stiffness(2.0, 0.5), rel=1e-9)
        here = params.snapshot(params.trainable(model))
        ends = []
        for pull in (whole, other):
            with torch.no_grad():
                for name, p in params.trainable(model).items():
                    p.copy_(here[name])
            pull.step(STRENGTH, 0.3)
            ends.append(params.snapshot(params.trainable(model)))
        for name in here:
            torch.testing.assert_close(ends[0][name], ends[1][name])
