"""Interpolation: exact ends, linear between, in place, low precision, tied weights, low rank."""

import pytest
import torch

from retain.errors import ConfigError, ModelError
from retain.functional.merging import interpolate, scale_low_rank


def states(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(4, 3, generator=g).to(dtype), "steps": torch.tensor(3)}
    final = {"w": (10 * torch.randn(4, 3, generator=g)).to(dtype), "steps": torch.tensor(7)}
    return start, final


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_ends_are_bit_identical(dtype, in_place):
    for share in (0, 1):
        start, final = states(dtype)
        expected = {k: v.clone() for k, v in (final if share else start).items()}
        merged = interpolate(start, final, share, in_place=in_place)
        assert all(torch.equal(merged[k], expected[k]) and merged[k].dtype == expected[k].dtype for k in expected)
        assert (merged["w"] is final["w"]) == in_place


def test_linear_in_share_against_float64():
    start, final = states()
    for share in (0.1, 0.5, 0.9):
        exact = start["w"].double() + share * (final["w"].double() - start["w"].double())
        torch.testing.assert_close(interpolate(start, final, share)["w"].double(), exact, rtol=1e-6, atol=1e-6)
    assert interpolate(start, final, 0.5)["steps"] == 7


def test_low_precision_is_rounded_once():
    start, final = states(torch.bfloat16)
    exact = start["w"].double() + 0.3 * (final["w"].double() - start["w"].double())
    assert torch.equal(interpolate(start, final, 0.3)["w"], exact.bfloat16())


def test_not_in_place_leaves_the_inputs_and_shares_no_memory():
    start, final = states()
    kept = final["w"].clone()
    for share in (0, 0.5, 1):
        interpolate(start, final, share)["w"].add_(1)
        assert torch.equal(final["w"], kept)
    assert torch.equal(start["w"], states()[0]["w"])


def test_tied_tensors_are_written_once():
    start, final = states()
    tied = {"in": final["w"], "out": final["w"].view(4, 3)}
    expected = interpolate({"w": start["w"]}, {"w": final["w"]}, 0.25)["w"]
    interpolate({"in": start["w"], "out": start["w"]}, tied, 0.25, in_place=True)
    assert torch.equal(tied["in"], expected)
    assert torch.equal(tied["out"], expected)


def test_low_rank_scales_b_only():
    g = torch.Generator().manual_seed(0)
    base, b, a = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 4), (5, 2), (2, 4)))
    dense = interpolate({"w": base}, {"w": base + 0.5 * b @ a}, 0.3)["w"]
    torch.testing.assert_close(base + 0.5 * scale_low_rank(b, 0.3) @ a, dense, rtol=1e-12, atol=1e-14)
    assert torch.equal(scale_low_rank(b, 1), b)
    assert not scale_low_rank(b, 0).any()


def test_errors():
    start, final = states()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            interpolate(start, final, share)
    with pytest.raises(ModelError, match="'steps'"):
        interpolate({"w": start["w"]}, final, 0.5)
    with pytest.raises(ModelError, match="'w' is"):
        interpolate({**start, "w": start["w"].T}, final, 0.5)
