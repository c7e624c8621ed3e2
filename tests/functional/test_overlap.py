"""Overlap of rows: both forms against loops in float64, gradients against autograd, and the size at chance."""

import itertools

import pytest
import torch

from retain.functional.overlap import chance_scale, overlap, overlap_gradient

FORMS = ("squared", "absolute")


@pytest.fixture
def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 12, generator=generator, dtype=torch.float64) for rows in (3, 5)]


def test_both_forms_are_sums_over_pairs_of_rows(matrices):
    a, others = matrices
    products = [sum(float(x) * float(y) for x, y in zip(u, v)) for u, v in itertools.product(a, others)]
    assert float(overlap(a, others, "squared")) == pytest.approx(sum(p * p for p in products), rel=1e-12)
    assert float(overlap(a, others, "absolute")) == pytest.approx(sum(abs(p) for p in products), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_autograd(matrices, form):
    a, others = matrices
    a.requires_grad_(True)
    (wanted,) = torch.autograd.grad(overlap(a, others, form), a)
    torch.testing.assert_close(overlap_gradient(a, others, form), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_zero_means_orthogonal(matrices, form):
    a, others = matrices
    outside = a - (a @ torch.linalg.pinv(others)) @ others
    assert float(overlap(outside, others, form)) < 1e-12
    assert float(overlap(outside + 1e-3 * others[:3], others, form)) > 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "others", "width", "size"), [(2, 8, 64, 1.0), (16, 4, 512, 0.01), (8, 8, 2048, 30.0)])
def test_unrelated_factors_of_any_size_overlap_by_one(form, rows, others, width, size):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(30):
        a, p = (torch.randn(k, width, generator=generator) * size for k in (rows, others))
        scale = chance_scale(rows, float(a.norm()), others, float(p.norm()), width, form)
        found.append(float(overlap(a, scale * p, form)))
    assert sum(found) / len(found) == pytest.approx(1.0, rel=0.15)
    assert chance_scale(2, 0.0, 2, 1.0, 4, form) == 0.0


def test_half_precision_is_summed_in_float32(matrices):
    a, others = (m.bfloat16() for m in matrices)
    assert overlap(a, others, "squared").dtype == overlap_gradient(a, others, "squared").dtype == torch.float32
