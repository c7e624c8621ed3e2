"""Stored states: two bits say all that the margin needs, more bits are as near as they promise."""

import pytest
import torch

from retain.errors import ConfigError
from retain.functional import stored_states


def states(n=40, h=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 5.0, 20.0, 1.0, 0.01, 3.0]).double()
    return torch.randn(n, h, generator=generator, dtype=torch.float64) * scale + 2.0


def moments_of(h, parts=(3, 10, 27)):
    moments = stored_states.Moments()
    for part in h.split(list(parts)):
        moments.add(part)
    return moments


def by_hand(now, past, mean, deviation):
    """The loss of GeRe entry by entry from the states themselves, in units of σ."""
    paid = []
    for row, old in zip(now.tolist(), past.tolist()):
        for x, x0, m, s in zip(row, old, mean.tolist(), deviation.tolist()):
            low, high = m - s, m + s
            if x0 <= low:
                loss = max(0.0, x - low)
            elif x0 >= high:
                loss = max(0.0, high - x)
            else:
                loss = max(0.0, x - high) + max(0.0, low - x)
            if loss > 0:
                paid.append(loss / s)
    return sum(paid), len(paid)


def test_moments_of_parts_are_those_of_the_whole():
    h, found = states(), moments_of(states())
    torch.testing.assert_close(found.mean, h.mean(0))
    torch.testing.assert_close(found.deviation, h.std(0, correction=0))
    assert torch.equal(found.low, h.amin(0))
    assert torch.equal(found.high, h.amax(0))


def test_a_dimension_that_never_varies_divides_by_no_zero():
    h = states()
    h[:, 2] = 4.0
    found = moments_of(h)
    codes = stored_states.ranges(h, found.mean, found.deviation)
    assert float(found.deviation[2]) > 0
    assert torch.isfinite(stored_states.margin(h + 1.0, codes, found.mean, found.deviation)[0])


def test_two_bits_reproduce_the_loss_of_the_states_themselves():
    past, now, moments = states(), states(seed=1), moments_of(states())
    codes = stored_states.ranges(past, moments.mean, moments.deviation)
    kept = stored_states.unpack(stored_states.pack(codes, 2), 2, 7)
    total, count = stored_states.margin(now, kept, moments.mean, moments.deviation)
    wanted, paying = by_hand(now, past, moments.mean, moments.deviation)
    assert {0, 1, 2} == set(codes.unique().tolist())
    assert int(count) == paying
    assert 0 < paying < now.numel(), "the mean is over entries that pay"
    assert float(total) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_exactly_zero_at_the_start(dtype):
    past = states().to(dtype).requires_grad_()
    moments = moments_of(past)
    mean, deviation = moments.mean.float(), moments.deviation.float()
    codes = stored_states.ranges(past.detach(), mean, deviation)
    total, count = stored_states.margin(past, codes, mean, deviation)
    assert float(total.detach()) == 0.0
    assert int(count) == 0
    assert not torch.autograd.grad(total, past)[0].any()


def test_the_gradient_points_home_and_only_where_something_is_paid():
    past, moments = states(), moments_of(states())
    codes = stored_states.ranges(past, moments.mean, moments.deviation)
    now = states(seed=1).requires_grad_()
    total, count = stored_states.margin(now, codes, moments.mean, moments.deviation)
    (slope,) = torch.autograd.grad(total, now)
    assert int((slope != 0).sum()) == int(count)
    nearer = now.detach() - 1e-3 * slope.sign() * moments.deviation
    assert stored_states.margin(nearer, codes, moments.mean, moments.deviation)[0] < total
    assert torch.autograd.gradcheck(
        lambda h: stored_states.margin(h, codes, moments.mean, moments.deviation)[0], now.detach().requires_grad_()
    )


@pytest.mark.parametrize("bits", stored_states.BITS)
@pytest.mark.parametrize("width", [1, 7, 8])
def test_packing_loses_nothing_and_no_bit(bits, width):
    codes = torch.randint(0, 2**bits, (5, width), generator=torch.Generator().manual_seed(bits)).int()
    codes[0] = 2**bits - 1
    packed = stored_states.pack(codes, bits)
    assert torch.equal(stored_states.unpack(packed, bits, width), codes)
    assert packed.numel() * packed.element_size() == 5 * -(-width * bits // 8)


def test_other_bits_are_refused():
    with pytest.raises(ConfigError, match=r"bits: 3 given"):
        stored_states.pack(torch.zeros(1, 1), 3)


@pytest.mark.parametrize("bits", stored_states.BITS)
def test_rounded_states_are_within_half_a_step(bits):
    h, moments = states(), moments_of(states())
    back = stored_states.dequantise(
        stored_states.quantise(h, moments.low, moments.high, bits), moments.low, moments.high, bits
    )
    step = (moments.high - moments.low) / (2**bits - 1)
    assert bool(((back.double() - h).abs() <= step / 2 + 1e-5).all())


def test_squared_distance_is_the_dense_one():
    past, now, moments = states(), states(seed=1), moments_of(states())
    total, count = stored_states.squared(now, past, moments.deviation)
    wanted = sum(
        ((x - y) / s) ** 2
        for row, old in zip(now.tolist(), past.tolist())
        for x, y, s in zip(row, old, moments.deviation.tolist())
    )
    assert float(total) == pytest.approx(wanted, rel=1e-12)
    assert int(count) == 280
