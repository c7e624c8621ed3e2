"""Where an adapter begins again, and how what it learned is merged."""

import pytest
import torch

from retain.functional.single_adapter import merge, merging_weight, orthonormal_rows


def test_rows_become_orthonormal_and_span_the_same():
    a = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = orthonormal_rows(a)
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    r = a @ q.T  # Aᵀ = Q R
    torch.testing.assert_close(r @ q, a, atol=1e-12, rtol=0)
    assert torch.allclose(r.triu(1), torch.zeros_like(r), atol=1e-12)
    assert bool((r.diagonal() > 0).all()), "the sign is fixed, or two machines would begin at different places"


def test_rows_that_are_orthonormal_already_stay():
    q = orthonormal_rows(torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    torch.testing.assert_close(orthonormal_rows(q), q, atol=1e-12, rtol=0)
    assert orthonormal_rows(q.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("weight", ["sqrt", "mean", "last"])
def test_merging_over_tasks(weight):
    generator = torch.Generator().manual_seed(2)
    tuned = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(5)]
    found = tuned[0]
    for i, b in enumerate(tuned[1:], 2):
        found = merge(found, b, merging_weight(i, weight))
    if weight == "mean":
        wanted = sum(tuned) / 5
    elif weight == "last":
        wanted = tuned[-1]
    else:
        shares = [(i**-0.5) * torch.tensor([1 - j**-0.5 for j in range(i + 1, 6)]).prod().item() for i in range(1, 6)]
        wanted = sum(share * b for share, b in zip(shares, tuned))
        assert sum(shares) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert merging_weight(1, weight) == 1
