"""Dense divergences against F.kl_div, against plain loops, and in their limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from retain.errors import ConfigError
from retain.functional import divergence, tiled_head


def logits(seed, n=5, v=9):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, v, generator=g, dtype=torch.float64)


def slow_kl(a, b):
    """KL of two probability vectors, one outcome at a time."""
    return math.fsum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist()) if x > 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_both_directions_equal_kl_div_with_gradient(temperature):
    teacher, student = logits(0), logits(1).requires_grad_()
    log_p0 = torch.log_softmax(teacher / temperature, -1)
    log_p = torch.log_softmax(student / temperature, -1)
    for ours, theirs in (
        (divergence.kl, F.kl_div(log_p, log_p0, reduction="none", log_target=True)),
        (divergence.reverse_kl, F.kl_div(log_p0, log_p, reduction="none", log_target=True)),
    ):
        value, expected = ours(teacher, student, temperature), temperature**2 * theirs.sum(-1)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
        (a,) = torch.autograd.grad(value.sum(), student)
        (b,) = torch.autograd.grad(expected.sum(), student, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_temperature_factor_keeps_the_size_of_the_gradient():
    # For small logits the gradient of T² KL tends to (z − z⁰)/V, whatever T (Hinton 2015, §2.1).
    teacher, student = 1e-4 * logits(0), (1e-4 * logits(1)).requires_grad_()
    gap = student - teacher
    limit = (gap - gap.mean(-1, keepdim=True)).detach() / 9
    for temperature in (1.0, 10.0):
        (slope,) = torch.autograd.grad(divergence.kl(teacher, student, temperature).sum(), student)
        torch.testing.assert_close(slope, limit, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_jsd_equals_slow_sum_and_is_bounded(weight):
    teacher, student = logits(0), logits(1)
    value = divergence.jsd(teacher, student, weight, temperature=1.3)
    p0, p = torch.softmax(teacher / 1.3, -1), torch.softmax(student / 1.3, -1)
    m = weight * p0 + (1 - weight) * p
    for i in range(len(p)):
        expected = 1.69 * (weight * slow_kl(p0[i], m[i]) + (1 - weight) * slow_kl(p[i], m[i]))
        assert value[i].item() == pytest.approx(expected, rel=1e-12)
    assert (value < 1.69 * math.log(2)).all()


def test_jsd_limits_and_symmetry():
    teacher, student = logits(0), logits(1)
    small = 1e-6
    torch.testing.assert_close(
        divergence.jsd(teacher, student, small) / small, divergence.kl(teacher, student), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        divergence.jsd(teacher, student, 1 - small) / small, divergence.reverse_kl(teacher, student), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        divergence.jsd(teacher, student, 0.3), divergence.jsd(student, teacher, 0.7), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("function", [divergence.kl, divergence.reverse_kl, divergence.jsd])
def test_gradcheck_zero_at_the_teacher_and_finite_with_impossible_tokens(function):
    teacher, student = logits(0), logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function(teacher, z), student)
    same = teacher.clone().requires_grad_()
    value = function(teacher, same)
    (slope,) = torch.autograd.grad(value.sum(), same)
    assert value.abs().max() < 1e-14
    assert slope.abs().max() < 1e-14
    labels = torch.arange(5)
    masked = function(divergence.mask_target(teacher, labels), divergence.mask_target(student, labels))
    (slope,) = torch.autograd.grad(masked.sum(), student)
    assert masked.isfinite().all()
    assert slope.isfinite().all()
    assert (slope[range(5), labels] == 0).all()
    assert slope.abs().max() > 1e-3


def test_masked_target_equals_dropping_the_column_and_tiles_agree():
    teacher, student, labels = logits(0), logits(1), torch.tensor([3, 0, 8, 1, 3])
    value = divergence.kl(divergence.mask_target(teacher, labels), divergence.mask_target(student, labels))
    keep = torch.ones(5, 9, dtype=torch.bool).scatter(1, labels[:, None], False)
    dropped = divergence.kl(teacher[keep].view(5, 8), student[keep].view(5, 8))
    torch.testing.assert_close(value, dropped, rtol=1e-12, atol=1e-14)
    eye = tiled_head.Head(torch.eye(9, dtype=torch.float64))
    tiled = tiled_head.divergence(student, eye, teacher, eye, exclude=labels, tile=2)
    torch.testing.assert_close(tiled, value, rtol=1e-12, atol=1e-14)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    where = torch.argsort(order)[labels]
    permuted = divergence.kl(
        divergence.mask_target(teacher[:, order], where), divergence.mask_target(student[:, order], where)
    )
    torch.testing.assert_close(permuted, value, rtol=1e-12, atol=1e-14)
    two = divergence.kl(
        divergence.mask_target(logits(0, v=2), labels % 2), divergence.mask_target(logits(1, v=2), labels % 2)
    )
    assert (two == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_with_tail_is_a_growing_lower_bound(temperature):
    teacher, student = logits(0), logits(1).requires_grad_()
    full = divergence.kl(teacher, student, temperature)
    previous = torch.zeros(5, dtype=torch.float64)
    for k in range(1, 10):
        value = divergence.top_k_kl(*divergence.top_k(teacher, k, temperature), student, temperature)
        assert (value <= full + 1e-12).all()
        assert (value >= previous - 1e-12).all()
        previous = value
    torch.testing.assert_close(value, full, rtol=1e-10, atol=1e-12)
    (a,) = torch.autograd.grad(value.sum(), student)
    (b,) = torch.autograd.grad(full.sum(), student)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_top_k_equals_lumping_by_hand_and_sees_mass_that_leaves_the_list():
    teacher, student = logits(0), logits(1)
    ids, kept = divergence.top_k(teacher, 3)
    value = divergence.top_k_kl(ids, kept, student)
    p0, p = torch.softmax(teacher, -1), torch.softmax(student, -1)
    for i in range(5):
        rest = [j for j in range(9) if j not in ids[i].tolist()]
        lump = [torch.stack([*x[i][ids[i]], x[i][rest].sum()]) for x in (p0, p)]
        assert value[i].item() == pytest.approx(slow_kl(*lump), rel=1e-10)
    outside = [next(j for j in range(9) if j not in row) for row in ids.tolist()]
    moved = teacher.clone()
    moved[range(5), outside] += 30
    assert (divergence.top_k_kl(ids, kept, moved) > 5).all()


def test_tail_is_finite_in_value_and_gradient_when_nothing_is_left():
    sharp = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    ids, kept = divergence.top_k(torch.zeros(1, 3), 1)
    value = divergence.top_k_kl(ids, kept, sharp)
    (slope,) = torch.autograd.grad(value.sum(), sharp)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    half = torch.tensor([[0.2, 0.3]], dtype=torch.float64).log()
    assert divergence.log_tail(half).item() == pytest.approx(math.log(0.5))
    tiny = torch.log1p(torch.tensor([[-1e-12]], dtype=torch.float64))
    assert divergence.log_tail(tiny).item() == pytest.approx(math.log(1e-12), rel=1e-9)


def test_tail_kl_from_tiled_log_probs():
    teacher, student = logits(0), logits(1)
    ids, kept = divergence.top_k(teacher, 4)
    chosen, _ = tiled_head.log_probs(student, tiled_head.Head(torch.eye(9, dtype=torch.float64)), ids, tile=2)
    torch.testing.assert_close(
        divergence.tail_kl(kept, chosen), divergence.top_k_kl(ids, kept, student), rtol=1e-12, atol=1e-14
    )


def test_errors():
    with pytest.raises(ConfigError, match="temperature"):
        divergence.kl(logits(0), logits(1), 0)
    with pytest.raises(ConfigError, match="reverse_kl"):
        divergence.jsd(logits(0), logits(1), 0.0)
    with pytest.raises(ConfigError, match="1 to 9"):
        divergence.top_k(logits(0), 10)
