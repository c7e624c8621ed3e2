"""The map of a bottleneck adapter, against loops."""

import torch

from retain.functional.bottleneck import bottleneck, parameters_per_site


def slow(x, down, down_bias, up, up_bias):
    """One number at a time."""
    made = x.clone()
    for row in range(len(x)):
        inner = []
        for m in range(len(down)):
            total = float(down_bias[m]) + sum(float(down[m, d]) * float(x[row, d]) for d in range(x.shape[1]))
            inner.append(max(0.0, total))
        for d in range(x.shape[1]):
            made[row, d] += float(up_bias[d]) + sum(float(up[d, m]) * inner[m] for m in range(len(down)))
    return made


def drawn(dtype=torch.float64):
    torch.manual_seed(0)
    sizes = [(5, 6), (3, 6), (3,), (6, 3), (6,)]
    return [torch.randn(size, dtype=dtype) for size in sizes]


def test_equals_loops():
    parts = drawn()
    torch.testing.assert_close(bottleneck(*parts), slow(*parts), atol=1e-12, rtol=0)


def test_identity_where_the_way_up_is_zero():
    x, down, down_bias, up, up_bias = drawn()
    assert torch.equal(bottleneck(x, down, down_bias, up * 0, up_bias * 0), x)


def test_a_dead_inner_unit_leaves_the_bias():
    x, down, down_bias, up, up_bias = drawn()
    torch.testing.assert_close(bottleneck(x, down, down_bias - 1e6, up, up_bias), x + up_bias)


def test_half_precision_stream_keeps_its_dtype():
    x, *weights = drawn(torch.float32)
    made = bottleneck(x.bfloat16(), *weights)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), bottleneck(x, *weights), atol=0.1, rtol=0.02)


def test_parameters_per_site():
    parts = drawn()[1:]
    assert parameters_per_site(6, 3) == sum(p.numel() for p in parts)
