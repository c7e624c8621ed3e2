"""Quadratic pulls against autograd, finite differences and dense products, in float64."""

import pytest
import torch

from retain.errors import ConfigError
from retain.functional import penalties
from retain.functional.penalties import LowRank


def lists(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (2, 3, 2)]

    def draw():
        return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]

    return draw(), draw(), [f.square() for f in draw()]


def added(params, anchors, importance, strength):
    gradients = [torch.full_like(p, 0.25) for p in params]
    penalties.add_quadratic_gradient(gradients, params, anchors, importance, strength)
    return [g - 0.25 for g in gradients]


@pytest.mark.parametrize("strength", [0.7, [0.5, 1.0, 3.0]])
def test_gradient_equals_autograd_and_finite_differences(strength):
    params, anchors, importance = lists()
    importance[1] = None
    leaves = [p.clone().requires_grad_() for p in params]
    value = penalties.quadratic_value(leaves, anchors, importance, strength)
    pulls = added(params, anchors, importance, strength)
    for a, b in zip(pulls, torch.autograd.grad(value, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    step = 1e-5
    for index in range(3):
        ends = []
        for sign in (1, -1):
            moved = [p.clone() for p in params]
            moved[index].view(-1)[1] += sign * step
            ends.append(penalties.quadratic_value(moved, anchors, importance, strength).item())
        assert pulls[index].view(-1)[1].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-7, abs=1e-9)


def test_value_equals_slow_loop():
    params, anchors, importance = lists()
    slow = 0.0
    for p, a, f, s in zip(params, anchors, importance, [1.0, 2.0, 3.0]):
        for x, y, z in zip(p.flatten().tolist(), a.flatten().tolist(), f.flatten().tolist()):
            slow += s * z * (x - y) ** 2 / 2
    assert penalties.quadratic_value(params, anchors, importance, [1.0, 2.0, 3.0]).item() == pytest.approx(slow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_comes_with_the_gradient(dtype):
    params, anchors, importance = lists(dtype=dtype)
    importance[2] = None
    strengths = [1.0, 0.0, 3.0]
    gradients = [torch.zeros_like(p) for p in params]
    value = penalties.add_quadratic_gradient(gradients, params, anchors, importance, strengths, value=True)
    expected = penalties.quadratic_value(params, anchors, importance, strengths)
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    alone = [torch.zeros_like(p) for p in params]
    assert penalties.add_quadratic_gradient(alone, params, anchors, importance, strengths) is None
    for a, b in zip(gradients, alone):
        torch.testing.assert_close(a, b)


def test_importance_of_one_is_l2_sp():
    params, anchors, importance = lists()
    ones = [torch.ones_like(f) for f in importance]
    for a, b in zip(added(params, anchors, ones, 0.3), added(params, anchors, None, 0.3)):
        assert torch.equal(a, b)
    expected = 0.15 * sum((p - a).square().sum() for p, a in zip(params, anchors))
    torch.testing.assert_close(penalties.quadratic_value(params, anchors, None, 0.3), expected)


def test_at_the_anchor_and_at_strength_zero_nothing_changes_bit_for_bit():
    params, anchors, importance = lists()
    for dtype in (torch.float64, torch.bfloat16):
        gradients = [torch.randn_like(p).to(dtype) for p in params]
        before = [g.clone() for g in gradients]
        penalties.add_quadratic_gradient(gradients, params, params, importance, 3.0)
        poisoned = [torch.full_like(f, torch.inf) for f in importance]
        penalties.add_quadratic_gradient(gradients, params, anchors, poisoned, 0.0)
        assert all(torch.equal(a, b) for a, b in zip(gradients, before))
        moved = [p.clone() for p in params]
        penalties.proximal(moved, anchors, importance, 0.0, 0.1)
        penalties.proximal(moved, params, importance, 1e6, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(moved, params))


def test_groups_do_not_change_the_result(monkeypatch):
    params, anchors, importance = lists()
    whole = added(params, anchors, importance, [1.0, 0.0, 2.0])
    monkeypatch.setattr(penalties, "GROUP_ELEMENTS", 6)
    for a, b in zip(added(params, anchors, importance, [1.0, 0.0, 2.0]), whole):
        assert torch.equal(a, b)


def test_low_precision_gradients_with_float32_anchors():
    params, anchors, importance = lists(dtype=torch.bfloat16)
    anchors, importance = [a.float() for a in anchors], [f.float() for f in importance]
    gradients = [torch.zeros_like(p) for p in params]
    penalties.add_quadratic_gradient(gradients, params, anchors, importance, 0.5)
    for g, p, a, f in zip(gradients, params, anchors, importance):
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g, (0.5 * f * (p.float() - a)).bfloat16())


@pytest.mark.parametrize("weighted", [True, False])
def test_proximal_is_the_minimiser(weighted):
    params, anchors, importance = lists()
    weights = importance if weighted else [None] * 3
    moved = [p.clone() for p in params]
    penalties.proximal(moved, anchors, weights, [1.0, 2.0, 5.0], [0.1, 0.3, 0.2])
    for x, p, a, f, s, rate in zip(moved, params, anchors, weights, [1.0, 2.0, 5.0], [0.1, 0.3, 0.2]):
        k = rate * s * (torch.ones_like(p) if f is None else f)
        torch.testing.assert_close(x, (p + k * a) / (1 + k), rtol=1e-12, atol=1e-14)
        # the derivative of |x − θ|²/(2η) + ½ λ F (x − θ*)² is zero there
        torch.testing.assert_close((x - p) / rate + k / rate * (x - a), torch.zeros_like(p), rtol=0, atol=1e-12)


def test_proximal_is_stable_where_the_explicit_step_is_not_and_ends_at_the_anchor():
    params, anchors, importance = lists()
    assert penalties.stiffness(importance, 1e6, 1.0) > 2
    penalties.proximal(params, anchors, None, 1e12, 1.0)
    for p, a in zip(params, anchors):
        torch.testing.assert_close(p, a, rtol=1e-9, atol=1e-9)


def test_stiffness_tells_where_gradient_descent_diverges():
    f = [torch.tensor([0.5, 4.0]), torch.tensor([1.0]), None]
    assert penalties.stiffness(f, [1.0, 10.0, 2.0], 0.1) == pytest.approx(1.0)
    assert penalties.stiffness(f, 0.0, 0.1) == 0
    for rate, stable in ((0.49, True), (0.51, False)):
        theta = [torch.tensor([1.0, 1.0], dtype=torch.float64)]
        anchor, weights = [torch.zeros(2, dtype=torch.float64)], [f[0].double()]
        assert (penalties.stiffness(weights, 1.0, rate) < 2) == stable
        for _ in range(200):
            pull = [torch.zeros(2, dtype=torch.float64)]
            penalties.add_quadratic_gradient(pull, theta, anchor, weights, 1.0)
            theta[0] -= rate * pull[0]
        assert (theta[0].abs().max() < 1).item() == stable


def low_rank(anchored=True, weighted=True, rank0=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    b, a = draw(6, 2).requires_grad_(), draw(2, 5).requires_grad_()
    b0, a0 = (draw(6, rank0), draw(rank0, 5)) if anchored else (None, None)
    f = draw(6, 5).square()
    rows, columns = (f.sum(1), f.sum(0)) if weighted else (None, None)
    return LowRank(b, a, b0, a0, 1.7, rows, columns)


def dense_value(factor, strength):
    delta = factor.b @ factor.a
    if factor.b0 is not None:
        delta = delta - factor.b0 @ factor.a0
    f = 1 if factor.rows is None else torch.outer(factor.rows, factor.columns) / factor.rows.sum()
    return 0.5 * strength * factor.scale**2 * (f * delta.square()).sum()


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rank0", [2, 3])
def test_low_rank_equals_dense_and_closed_gradients_equal_autograd(anchored, weighted, rank0):
    factors = [low_rank(anchored, weighted, rank0, seed) for seed in (0, 1)]
    value = penalties.low_rank_value(factors, [0.6, 2.0])
    expected = dense_value(factors[0], 0.6) + dense_value(factors[1], 2.0)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for factor, strength, closed in zip(factors, [0.6, 2.0], penalties.low_rank_gradients(factors, [0.6, 2.0])):
        dense = torch.autograd.grad(dense_value(factor, strength), [factor.b, factor.a])
        for a, b in zip(closed, dense):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    ours = torch.autograd.grad(value, [x for f in factors for x in (f.b, f.a)])
    theirs = torch.autograd.grad(expected, [x for f in factors for x in (f.b, f.a)])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_low_rank_importance_of_one_is_the_frobenius_norm():
    plain = low_rank(weighted=False)
    ones = LowRank(
        plain.b, plain.a, plain.b0, plain.a0, plain.scale,
        torch.full((6,), 5.0, dtype=torch.float64), torch.full((5,), 6.0, dtype=torch.float64),
    )  # fmt: skip
    value = penalties.low_rank_value([plain], 0.4)
    torch.testing.assert_close(penalties.low_rank_value([ones], 0.4), value, rtol=1e-12, atol=0)
    norm = torch.linalg.matrix_norm(1.7 * (plain.b @ plain.a - plain.b0 @ plain.a0))
    torch.testing.assert_close(value, 0.2 * norm**2, rtol=1e-12, atol=0)
    # not |A|² + |B|²: the same product from other factors costs the same
    split = LowRank(10 * plain.b, plain.a / 10, plain.b0, plain.a0, plain.scale)
    torch.testing.assert_close(penalties.low_rank_value([split], 0.4), value, rtol=1e-12, atol=0)


def test_low_rank_is_exactly_zero_at_the_anchor_and_accurate_near_it():
    some = low_rank()
    factor = LowRank(some.b.float(), some.a.float(), some.b.float(), some.a.float(), 1.7, some.rows, some.columns)
    assert penalties.low_rank_value([factor], 1.0) == 0
    assert not any(g.any() for pair in penalties.low_rank_gradients([factor], 1.0) for g in pair)
    fresh = LowRank(torch.zeros(6, 2), some.a.float())
    assert penalties.low_rank_value([fresh], 1.0) == 0
    assert not any(g.any() for pair in penalties.low_rank_gradients([fresh], 1.0) for g in pair)
    near = some.b.detach().float() + 1e-4
    close = LowRank(near, some.a.detach().float(), some.b.detach().float(), some.a.detach().float())
    exact = dense_value(LowRank(near.double(), close.a.double(), close.b0.double(), close.a0.double()), 1.0)
    assert penalties.low_rank_value([close], 1.0).item() == pytest.approx(exact.item(), rel=1e-4)


def test_low_rank_without_importance_mass_is_zero():
    some = low_rank()
    none = LowRank(some.b, some.a, rows=torch.zeros(6), columns=torch.zeros(5))
    assert penalties.low_rank_value([none], 1.0) == 0


def test_errors_and_empty_lists():
    params, anchors, importance = lists()
    with pytest.raises(ConfigError, match="3 params, 2 anchors"):
        penalties.quadratic_value(params, anchors[:2], importance, 1.0)
    with pytest.raises(ConfigError, match="2 strength"):
        penalties.quadratic_value(params, anchors, importance, [1.0, 2.0])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="strength"):
            penalties.proximal(params, anchors, importance, bad, 0.1)
    with pytest.raises(ConfigError, match="both or none"):
        penalties.low_rank_value([LowRank(torch.ones(2, 1), torch.ones(1, 2), rows=torch.ones(2))], 1.0)
    assert penalties.quadratic_value([], [], None, 1.0) == 0
    assert penalties.low_rank_value([], 1.0) == 0


@pytest.mark.parametrize("weighted", [True, False])
def test_pieces_of_a_large_tensor_change_no_bit_of_pull_and_step(weighted, monkeypatch):
    def run(block):
        monkeypatch.setattr(penalties, "BLOCK_ELEMENTS", block)
        params, anchors, importance = lists(dtype=torch.float32)
        params.append(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).T)  # cannot be cut without a copy
        anchors.append(torch.zeros(6, 4))
        importance = [*importance, torch.ones(6, 4)] if weighted else None
        pulls = added(params, anchors, importance, 0.3)
        value = penalties.quadratic_value(params, anchors, importance, 0.3)
        penalties.proximal(params, anchors, importance, 0.3, 0.1)
        return [*pulls, *params], value

    (whole, value), (cut, same) = run(2**18), run(5)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut))
    torch.testing.assert_close(same, value, rtol=1e-6, atol=0)
