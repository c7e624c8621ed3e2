"""The tiled head against dense log-softmax, F.kl_div and autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retain.errors import ConfigError, ModelError
from retain.functional import tiled_head
from retain.functional.tiled_head import Head

FORMS = [{}, {"scale": 0.5}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 1.5}]


def dense_logits(hidden, head):
    z = F.linear(hidden, head.weight, head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def make(n=7, h=4, v=11, seed=0, bias=True, dtype=torch.float64, **form):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, Head(weight, b, **form), torch.randint(v, (n,), generator=g)


def dense_divergence(direction, weight, temperature, student, teacher):
    log_p = torch.log_softmax(student / temperature, -1)
    log_p0 = torch.log_softmax(teacher / temperature, -1)

    def kl(log_a, log_b):
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if direction == "forward":
        value = kl(log_p0, log_p)
    elif direction == "reverse":
        value = kl(log_p, log_p0)
    else:
        log_m = (weight * log_p0.exp() + (1 - weight) * log_p.exp()).log()
        value = weight * kl(log_p0, log_m) + (1 - weight) * kl(log_p, log_m)
    return temperature**2 * value


def gradients(result, hidden, head):
    wanted = [x for x in (hidden, head.weight, head.bias) if x is not None]
    return torch.autograd.grad(result, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [1, 3, 7, None])
def test_log_probs_and_gradients_equal_dense(form, tile):
    hidden, head, labels = make(**form)
    log_p, entropy = tiled_head.log_probs(hidden, head, labels, tile=tile)
    dense = torch.log_softmax(dense_logits(hidden, head), -1)
    expected, expected_entropy = dense[range(7), labels], -(dense.exp() * dense).sum(-1)
    torch.testing.assert_close(log_p, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-12)
    w = torch.linspace(-1, 2, 7, dtype=torch.float64)
    ours = gradients((w * log_p + w.flip(0) * entropy).sum(), hidden, head)
    theirs = gradients((w * expected + w.flip(0) * expected_entropy).sum(), hidden, head)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_log_probs(form):
    hidden, head, labels = make(n=3, v=5, **form)

    def call(h, w, b):
        return tiled_head.log_probs(h, Head(w, b, head.scale, head.softcap), labels, temperature=1.7, tile=2)

    assert torch.autograd.gradcheck(call, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [3, None])
@pytest.mark.parametrize("bias", [True, False])
def test_sampled_log_likelihood_equals_its_two_steps(form, tile, bias):
    hidden, head, _ = make(bias=bias, **form)
    labels = tiled_head.sample(hidden, head, torch.Generator().manual_seed(5))
    slow = tiled_head.log_probs(hidden, head, labels)[0].sum()
    fast = tiled_head.sampled_log_likelihood(hidden, head, torch.Generator().manual_seed(5), tile=tile)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    expected = gradients(-3 * slow, hidden, head)
    for a, b in zip(gradients(-3 * fast, hidden, head), expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    frozen = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap)
    alone = tiled_head.sampled_log_likelihood(hidden, frozen, torch.Generator().manual_seed(5))
    torch.testing.assert_close(torch.autograd.grad(-3 * alone, hidden)[0], expected[0])


@pytest.mark.parametrize("direction", tiled_head.DIRECTIONS)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("form", FORMS[::3])
def test_gradcheck_divergence(direction, exclude, form):
    hidden, head, labels = make(n=3, v=5, **form)
    t_hidden, t_head, _ = make(n=3, h=6, v=5, seed=1)

    def call(h, w, b):
        return tiled_head.divergence(
            h, Head(w, b, head.scale, head.softcap), t_hidden, t_head, direction=direction, weight=0.3,
            temperature=1.5, exclude=labels if exclude else None, tile=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("direction", tiled_head.DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tile", [1, 4, None])
def test_divergence_and_gradients_equal_kl_div(direction, temperature, tile):
    hidden, head, _ = make(softcap=4.0)
    t_hidden, t_head, _ = make(h=3, seed=1, scale=0.7)
    value = tiled_head.divergence(
        hidden, head, t_hidden, t_head, direction=direction, weight=0.2, temperature=temperature, tile=tile
    )
    teacher = dense_logits(t_hidden, t_head).detach()
    expected = dense_divergence(direction, 0.2, temperature, dense_logits(hidden, head), teacher)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    w = torch.linspace(-1, 2, 7, dtype=torch.float64)
    theirs = gradients((w * expected).sum(), hidden, head)
    for a, b in zip(gradients((w * value).sum(), hidden, head), theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert t_hidden.grad is None
    assert t_head.weight.grad is None


@pytest.mark.parametrize("direction", tiled_head.DIRECTIONS)
def test_divergence_is_zero_with_zero_gradient_at_the_teacher(direction):
    hidden, head, _ = make()
    value = tiled_head.divergence(hidden, head, hidden, head, direction=direction)
    assert value.abs().max() < 1e-14
    assert all(g.abs().max() < 1e-14 for g in gradients(value.sum(), hidden, head))


def test_many_labels_per_position():
    hidden, head, _ = make()
    ids = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(i))[:4] for i in range(7)])
    log_p, _ = tiled_head.log_probs(hidden, head, ids, tile=2)
    expected = torch.log_softmax(dense_logits(hidden, head), -1).gather(1, ids)
    torch.testing.assert_close(log_p, expected, rtol=1e-12, atol=1e-12)
    w = torch.arange(28.0, dtype=torch.float64).view(7, 4)
    theirs = gradients((w * expected).sum(), hidden, head)
    for a, b in zip(gradients((w * log_p).sum(), hidden, head), theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_excluded_label_gets_no_gradient_and_two_tokens_give_zero():
    hidden, head, labels = make(bias=True)
    t_hidden, t_head, _ = make(seed=1)
    value = tiled_head.divergence(hidden, head, t_hidden, t_head, exclude=labels, tile=3)
    (slope,) = torch.autograd.grad(value[2], head.bias)
    assert slope[labels[2]] == 0
    assert slope.abs().max() > 1e-3
    shifted = Head(head.weight, head.bias + 5 * F.one_hot(labels[2], 11), head.scale)
    again = tiled_head.divergence(hidden, shifted, t_hidden, t_head, exclude=labels)
    torch.testing.assert_close(again[2], value[2], rtol=1e-12, atol=1e-12)
    hidden, head, labels = make(v=2)
    t_hidden, t_head, _ = make(v=2, seed=1)
    assert (tiled_head.divergence(hidden, head, t_hidden, t_head, exclude=labels) == 0).all()


def test_no_positions():
    hidden, head, labels = make(n=0)
    log_p, entropy = tiled_head.log_probs(hidden, head, labels)
    assert log_p.shape == entropy.shape == (0,)
    value = tiled_head.divergence(hidden, head, hidden, head)
    for result in (log_p.sum() + entropy.sum(), value.sum()):
        for gradient, x in zip(gradients(result, hidden, head), (hidden, head.weight, head.bias)):
            assert gradient.shape == x.shape
            assert not gradient.any()


def test_frozen_head_gets_no_gradient():
    hidden, head, labels = make()
    frozen = Head(head.weight.detach(), head.bias.detach())
    tiled_head.log_probs(hidden, frozen, labels)[0].sum().backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None


def test_bfloat16_is_accumulated_in_float32():
    hidden, head, labels = make(n=40, h=64, v=50, dtype=torch.bfloat16)
    log_p, entropy = tiled_head.log_probs(hidden, head, labels, tile=7)
    assert log_p.dtype == entropy.dtype == torch.float32
    wide = Head(head.weight.float().detach().requires_grad_(), head.bias.float().detach().requires_grad_())
    wide_hidden = hidden.float().detach().requires_grad_()
    expected = torch.log_softmax(dense_logits(wide_hidden, wide), -1)[range(40), labels]
    torch.testing.assert_close(log_p, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(log_p.sum(), hidden, head), gradients(expected.sum(), wide_hidden, wide)
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=1e-4)  # one rounding, of the result


def test_autocast_uses_its_dtype_and_returns_float32():
    hidden, head, labels = make(n=5, h=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        log_p, _ = tiled_head.log_probs(hidden, head, labels)
        expected = torch.log_softmax(dense_logits(hidden, head).float(), -1)[range(5), labels]
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, expected, rtol=2e-2, atol=5e-2)
    log_p.sum().backward()
    assert head.weight.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_all_tokens_and_vocabulary():
    n, v, tile = 64, 300, 4
    hidden, head, labels = make(n=n, v=v)
    with Largest() as largest:
        log_p, entropy = tiled_head.log_probs(hidden, head, labels, tile=tile)
        value = tiled_head.divergence(hidden, head, hidden, head, tile=tile)
        (log_p + entropy + value).sum().backward()
    assert largest.elements <= max(tile * v, head.weight.numel())


def test_sampling_follows_the_model_and_ignores_tiles():
    hidden, head, _ = make(n=1, v=5)
    many = hidden.expand(20_000, 4)
    labels = tiled_head.sample(many, head, torch.Generator().manual_seed(3), tile=977)
    assert torch.equal(labels, tiled_head.sample(many, head, torch.Generator().manual_seed(3)))
    p = torch.softmax(dense_logits(hidden, head), -1)[0]
    expected = 20_000 * p
    chi2 = ((torch.bincount(labels, minlength=5) - expected) ** 2 / expected).sum()
    assert chi2 < 23.5  # 4 degrees of freedom, p = 1e-4
    assert torch.equal(tiled_head.invert(torch.tensor([[-torch.inf, 0.0]]), torch.zeros(1)), torch.tensor([1]))


def test_errors():
    hidden, head, labels = make()
    with pytest.raises(ConfigError, match="temperature"):
        tiled_head.log_probs(hidden, head, labels, temperature=0)
    with pytest.raises(ModelError, match="labels"):
        tiled_head.log_probs(hidden, head, labels[:3])
    with pytest.raises(ModelError, match="Select"):
        tiled_head.log_probs(hidden[None], head, labels)
    with pytest.raises(ModelError, match="tokenizer"):
        tiled_head.divergence(hidden, head, hidden, Head(head.weight[:5]))
    with pytest.raises(ConfigError, match="forward"):
        tiled_head.divergence(hidden, head, hidden, head, direction="forwards")
    with pytest.raises(ConfigError, match="weight"):
        tiled_head.divergence(hidden, head, hidden, head, direction="jsd", weight=1.0)
