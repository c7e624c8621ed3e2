"""Scores of tokens against dense softmax, sorting and autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retain.errors import ConfigError, ModelError
from retain.functional.tiled_head import Head
from retain.functional.token_scores import (
    BINS,
    LEAST_LOSS,
    MOST_LOSS,
    counted_quantile,
    label_margin,
    loss_counts,
    top_entropy,
)

FORMS = [{}, {"scale": 0.5}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 1.5}]


def make(n=7, h=4, v=31, bias=True, spread=1.0, **form):
    g = torch.Generator().manual_seed(0)
    hidden = (spread * torch.randn(n, h, generator=g, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).requires_grad_()
    b = torch.randn(v, generator=g, dtype=torch.float64).requires_grad_() if bias else None
    return hidden, Head(weight, b, **form), torch.randint(v, (n,), generator=g)


def dense_logits(hidden, head):
    z = F.linear(hidden, head.weight, head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [1, 3, None])
@pytest.mark.parametrize("k", [2, 20, 31, 99])
def test_top_entropy_is_that_of_the_sorted_probabilities(k, tile, form):
    hidden, head, _ = make(**form)
    found = top_entropy(hidden, head, k, tile=tile)
    for row, value in zip(dense_logits(hidden, head).detach().numpy(), found):
        p = np.exp(row) / np.exp(row).sum()
        best = np.sort(p)[::-1][:k]
        best = best / best.sum()
        assert float(value) == pytest.approx(-(best * np.log(best)).sum() / np.log(len(best)), rel=1e-12)
    assert not found.requires_grad


def test_top_entropy_at_its_limits():
    hidden, head, _ = make(spread=0.0)
    even = Head(head.weight, torch.zeros(31, dtype=torch.float64))
    assert top_entropy(hidden, even, 20).min() > 1 - 1e-12
    twenty = Head(head.weight, torch.where(torch.arange(31) < 20, 0.0, -50.0).double())
    assert top_entropy(hidden, twenty, 20).min() > 1 - 1e-12
    one = Head(head.weight, torch.where(torch.arange(31) == 4, 0.0, -80.0).double())
    assert top_entropy(hidden, one, 20).max() < 1e-12
    shifted = Head(head.weight, twenty.bias + 12.5)
    torch.testing.assert_close(top_entropy(hidden, shifted), top_entropy(hidden, twenty))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [1, 3, None])
def test_label_margin_and_gradients_equal_dense(tile, bias, form):
    hidden, head, labels = make(bias=bias, **form)
    z = dense_logits(hidden, head)
    wanted = z[range(7), labels] - z.mean(-1)
    found = label_margin(hidden, head, labels, tile=tile)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    w = torch.linspace(-1, 2, 7, dtype=torch.float64)
    learned = [x for x in (hidden, head.weight, head.bias) if x is not None]
    for a, b in zip(torch.autograd.grad((w * found).sum(), learned), torch.autograd.grad((w * wanted).sum(), learned)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_margin_makes_smoothed_cross_entropy(form):
    hidden, head, labels = make(**form)
    z = dense_logits(hidden, head)
    for share in (0.0, 0.1, 0.9):
        wanted = F.cross_entropy(z, labels, label_smoothing=share, reduction="none")
        plain = F.cross_entropy(z, labels, reduction="none")
        torch.testing.assert_close(plain + share * label_margin(hidden, head, labels), wanted, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_tensor_of_all_tokens_and_vocabulary(softcap):
    hidden, head, labels = make(n=64, v=300, softcap=softcap)
    with Largest() as largest:
        top_entropy(hidden, head, 20, tile=4)
        label_margin(hidden, head, labels, tile=4).sum().backward()
    assert largest.elements <= max(4 * 300, head.weight.numel())


def test_no_positions():
    hidden, head, labels = make(n=0)
    assert top_entropy(hidden, head).shape == (0,)
    assert label_margin(hidden, head, labels).sum() == 0


def test_bfloat16_is_computed_in_float32():
    hidden, head, labels = make(n=40, h=64, v=50)
    small = Head(head.weight.bfloat16(), head.bias.bfloat16())
    wide = Head(small.weight.double(), small.bias.double())
    for form in ({}, {"softcap": 3.0}):
        ours, theirs = Head(small.weight, small.bias, **form), Head(wide.weight, wide.bias, **form)
        for found, wanted in (
            (top_entropy(hidden.bfloat16(), ours), top_entropy(hidden.bfloat16().double(), theirs)),
            (label_margin(hidden.bfloat16(), ours, labels), label_margin(hidden.bfloat16().double(), theirs, labels)),
        ):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_counted_quantiles_are_those_of_the_losses():
    losses = torch.from_numpy(np.random.default_rng(0).lognormal(-1, 2, 20_000)).float()
    halves = loss_counts(losses[:700]) + loss_counts(losses[700:])
    assert torch.equal(halves, loss_counts(losses))
    assert halves.sum() == 20_000
    assert halves.shape == (BINS,)
    for share in (0.01, 0.1, 0.5, 0.9):
        assert counted_quantile(halves, share) == pytest.approx(float(np.quantile(losses, share)), rel=0.01)
    assert counted_quantile(torch.zeros(BINS, dtype=torch.float64), 0.5) is None


def test_losses_out_of_range_count_at_the_ends():
    counts = loss_counts(torch.tensor([0.0, 1e-30, math.inf, 1e30]))
    assert counts[0] == counts[-1] == 2
    assert counted_quantile(counts, 0.25) == pytest.approx(LEAST_LOSS, rel=0.01)
    assert counted_quantile(counts, 1.0) == pytest.approx(MOST_LOSS, rel=0.01)


def test_errors():
    hidden, head, labels = make()
    with pytest.raises(ConfigError, match=r"top_entropy\.k: 1 given"):
        top_entropy(hidden, head, 1)
    with pytest.raises(ModelError, match="label_margin: labels"):
        label_margin(hidden, head, labels[:3])
    with pytest.raises(ModelError, match="Select"):
        top_entropy(hidden[None], head)
