"""The path integral is the drop of the loss, and on LoRA products it knows nothing of the choice of factors."""

import pytest
import torch

from retain.functional import path_integral


def descend(curvature, start, rate, steps):
    """Gradient descent on ½ Σ a x²: the weights at the end and ω."""
    x, earned = start.clone(), torch.zeros_like(start)
    for _ in range(steps):
        slope = curvature * x
        after = x - rate * slope
        earned += path_integral.drop(slope, x, after)
        x = after
    return x, earned


def test_sum_of_drops_tends_to_the_drop_of_the_loss():
    curvature, start = torch.tensor([3.0, 0.5, 1.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    errors = []
    for rate in (0.02, 0.01, 0.005):
        end, earned = descend(curvature, start, rate, int(2 / rate))
        parts = 0.5 * curvature * (start.square() - end.square())
        errors.append(float((earned - parts).abs().max()))
    assert errors[0] == pytest.approx(2 * errors[1], rel=0.1)
    assert errors[1] == pytest.approx(2 * errors[2], rel=0.1)
    assert errors[2] < 0.02


def test_importance_of_a_minimised_parabola_is_half_its_curvature():
    curvature, start = torch.tensor([3.0, 0.5, 1.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    end, earned = descend(curvature, start, 0.001, 40_000)
    found = path_integral.importance(earned, (end - start).square(), 0.0)
    torch.testing.assert_close(found, curvature / 2, rtol=2e-3, atol=0)


def test_importance_is_never_negative_and_zero_without_a_move():
    drops, squares = torch.tensor([-1.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 3.0])
    torch.testing.assert_close(path_integral.importance(drops, squares, 1.0), torch.tensor([0.0, 0.0, 2.0, 0.5]))
    assert not path_integral.importance(torch.zeros(3), torch.zeros(3), 0.0).any()


def factors(m=5, n=4, r=2):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n), (m, r), (r, n)))


def test_squares_of_a_product_are_the_dense_ones():
    b, a, b0, a0 = factors()
    moved = (0.7 * (b @ a - b0 @ a0)).square()
    rows, columns = path_integral.product_squares(b, a, b0, a0, 0.7)
    torch.testing.assert_close(rows, moved.sum(1))
    torch.testing.assert_close(columns, moved.sum(0))


def test_rows_and_columns_are_those_of_the_product_for_any_choice_of_factors():
    """−G ⊙ s dB A by row and −G ⊙ s B dA by column, from the slopes of the factors alone."""
    b, a, db, da = factors()
    slope = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = torch.tensor([[2.0, 1.0], [0.5, -1.0]]).double()
    back = torch.linalg.inv(turn)
    for left, right, dl, dr in ((b, a, db, da), (b @ turn, back @ a, db @ turn, back @ da)):
        slope_b, slope_a = 0.7 * slope @ right.T, 0.7 * left.T @ slope
        rows = path_integral.drop(slope_b, left, left + dl).sum(1)
        columns = path_integral.drop(slope_a, right, right + dr).sum(0)
        torch.testing.assert_close(rows, -(slope * (0.7 * db @ a)).sum(1))
        torch.testing.assert_close(columns, -(slope * (0.7 * b @ da)).sum(0))


def test_importance_of_a_product_has_equal_sums_and_uses_either_factor_alone():
    rows, columns = torch.tensor([3.0, 1.0]).double(), torch.tensor([0.0, 1.0, 1.0]).double()
    squares = torch.tensor([3.0, 3.0]).double(), torch.tensor([2.0, 2.0, 2.0]).double()
    r, c = path_integral.product_importance(rows, columns, *squares, 1.0)
    torch.testing.assert_close(r.sum(), c.sum())
    torch.testing.assert_close(r, torch.tensor([4.0, 2.0]).double() / 2)  # (ω_i + 2/2) / (3/3 + 1)
    torch.testing.assert_close(c / c.sum(), torch.tensor([4.0, 7.0, 7.0]).double() / 18)  # ω_j + 4/3
    r, c = path_integral.product_importance(rows, torch.zeros(3).double(), *squares, 1.0)
    torch.testing.assert_close(c, c.mean().expand(3))
    torch.testing.assert_close(r[0], 3 * r[1])
    r, c = path_integral.product_importance(-rows, -columns, *squares, 1.0)
    assert not r.any()
    assert not c.any()
