"""The importance of MAS on a linear model, where it is known, and sample by sample."""

import pytest
import torch

from retain.errors import ConfigError, DataError
from retain.functional import sensitivity


def test_of_a_linear_model_it_is_known():
    """f = Wx: Ω_ij = E |2 f_i x_j|."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    samples = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    found = sensitivity.accumulate({"w": weight}, samples, lambda x: (weight @ x).square().sum())
    wanted = (2 * (samples @ weight.T)[:, :, None] * samples[:, None, :]).abs().mean(0)
    torch.testing.assert_close(found.diagonal["w"], wanted.detach())
    sums = sensitivity.accumulate({"w": weight}, samples, lambda x: (weight @ x).square().sum(), by_sums=True)
    torch.testing.assert_close(sums.rows["w"], wanted.detach().sum(1))
    torch.testing.assert_close(sums.columns["w"], wanted.detach().sum(0))


def test_samples_do_not_cancel():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = sensitivity.accumulate({"w": weight}, [1.0, -1.0], lambda x: (x * weight).sum())
    assert float(found.diagonal["w"]) == 1.0


def test_samples_that_say_nothing_are_left_out():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = sensitivity.accumulate({"w": weight}, [0.0, 3.0], lambda x: (x * weight).sum() if x else None)
    assert float(found.diagonal["w"]) == 3.0
    with pytest.raises(DataError, match="no sample"):
        sensitivity.accumulate({"w": weight}, [], lambda x: weight.sum())
    with pytest.raises(ConfigError, match="no weight"):
        sensitivity.accumulate({}, [1.0], lambda x: weight.sum())
