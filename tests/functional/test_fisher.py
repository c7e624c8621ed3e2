"""Fisher estimators against closed forms, Jacobians and per-sequence loops, in float64."""

import pytest
import torch
import torch.nn.functional as F

from retain.errors import ConfigError, DataError
from retain.functional import fisher, tiled_head
from retain.functional.fisher import Prediction

VOCABULARY, WIDTH, LENGTH = 5, 4, 4


def tiny_weights(seed=0):
    """A one-layer causal transformer: attention mixes positions, so tokens share the weights they touch."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (VOCABULARY, WIDTH), "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH),
        "up": (6, WIDTH), "down": (WIDTH, 6), "gain": (WIDTH,), "head": (VOCABULARY, WIDTH),
    }  # fmt: skip
    return {k: torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for k, s in shapes.items()}


def tiny_hidden(w, ids):
    x = w["embed"][ids]
    scores = (x @ w["query"].T) @ (x @ w["key"].T).transpose(-1, -2) / WIDTH**0.5
    hidden_future = torch.ones(ids.shape[-1], ids.shape[-1], dtype=torch.bool).triu(1)
    x = x + torch.softmax(scores.masked_fill(hidden_future, -torch.inf), -1) @ (x @ w["value"].T)
    x = x + torch.tanh(x @ w["up"].T) @ w["down"].T
    return (F.layer_norm(x, (WIDTH,)) * w["gain"]).flatten(0, -2)


def tiny_predict(w):
    def predict(ids):
        logits = tiny_hidden(w, ids) @ w["head"].T
        sequence = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        return Prediction(logits=logits, labels=ids.roll(-1, 1).flatten(), sequence=sequence)

    return predict


def sequences(count=3):
    return torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def jacobian_fisher(w, ids):
    """(1/N) Σ_t diag(Jᵀ (diag p − p pᵀ) J) with J = ∂ logits / ∂θ: the exact Fisher without any sampling."""

    def logits(weights):
        return tiny_hidden(weights, ids) @ weights["head"].T

    detached = {k: v.detach() for k, v in w.items()}
    jacobians = torch.func.jacrev(logits)(detached)
    p = torch.softmax(logits(detached), -1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return {k: torch.einsum("nv...,nvu,nu...->...", j, middle, j) / len(p) for k, j in jacobians.items()}


def test_softmax_regression_closed_form():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    result = fisher.accumulate({"w": weight}, [x[:2], x[2:]], lambda b: Prediction(b @ weight.T), "exact")
    p = torch.softmax(x @ weight.T, -1).detach()
    torch.testing.assert_close(result.diagonal["w"], (p * (1 - p)).T @ x.square() / 6, rtol=1e-10, atol=1e-14)
    assert result.tokens == 6


def test_exact_equals_jacobian_form_and_top_k_is_a_growing_lower_bound():
    w, ids = tiny_weights(), sequences(2)
    truth = jacobian_fisher(w, ids)
    result = fisher.accumulate(w, [ids], tiny_predict(w), "exact")
    for name in w:
        torch.testing.assert_close(result.diagonal[name], truth[name], rtol=1e-9, atol=1e-13)
    previous = {name: torch.zeros_like(x) for name, x in truth.items()}
    for k in range(1, VOCABULARY + 1):
        lumped = fisher.accumulate(w, [ids], tiny_predict(w), "exact", top_k=k).diagonal
        for name in w:
            assert (lumped[name] <= truth[name] + 1e-12).all()
            assert (lumped[name] >= previous[name] - 1e-12).all()
        previous = lumped
    for name in w:  # four of five named and one left over is everything
        torch.testing.assert_close(
            fisher.accumulate(w, [ids], tiny_predict(w), "exact", top_k=4).diagonal[name], truth[name],
            rtol=1e-6, atol=1e-10,
        )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_sampled_batch_sum_converges_to_the_exact_fisher_for_every_batch_size(batch):
    w, ids = tiny_weights(), sequences(3)
    truth, draws = jacobian_fisher(w, ids), 1500
    generator = torch.Generator().manual_seed(5)
    sums = {name: torch.zeros_like(x) for name, x in truth.items()}
    squares = {name: torch.zeros_like(x) for name, x in truth.items()}
    for _ in range(draws):
        one = fisher.accumulate(w, ids.split(batch), tiny_predict(w), "sampled", generator).diagonal
        for name in w:
            sums[name] += one[name]
            squares[name] += one[name].square()
    for name in w:
        mean = sums[name] / draws
        error = ((squares[name] / draws - mean.square()) / draws).sqrt()
        seen = truth[name] > 1e-3  # below, too few draws matter for a normal interval
        assert ((mean - truth[name]).abs()[seen] < 5.5 * error[seen]).all()
        assert mean.sum().item() == pytest.approx(truth[name].sum().item(), rel=0.12)


def test_squared_sum_at_true_labels_is_not_the_fisher():
    # what several public implementations compute; shows that the test above can tell
    w, ids = tiny_weights(), sequences(3)
    truth = jacobian_fisher(w, ids)
    prediction = tiny_predict(w)(ids)
    wrong = torch.autograd.grad(prediction.log_probs(prediction.labels).sum(), list(w.values()))
    ratio = sum(g.square().sum() for g in wrong) / len(prediction) / sum(f.sum() for f in truth.values())
    assert not 0.88 < ratio < 1.12


def test_empirical_equals_a_loop_over_single_sequences():
    w, ids = tiny_weights(), sequences(4)
    result = fisher.accumulate(w, ids.split(3), tiny_predict(w), "empirical")
    slow = {name: torch.zeros_like(x) for name, x in w.items()}
    for row in ids:
        log_p = torch.log_softmax(tiny_hidden(w, row[None]) @ w["head"].T, -1)
        loss = -sum(log_p[t, row[(t + 1) % LENGTH]] for t in range(LENGTH))
        for name, g in zip(w, torch.autograd.grad(loss, list(w.values()))):
            slow[name] += g.square() / 16
    for name in w:
        torch.testing.assert_close(result.diagonal[name], slow[name].detach(), rtol=1e-10, atol=1e-14)
    assert (result.tokens, result.sequences) == (16, 4)


def test_rank1_keeps_row_and_column_sums_of_the_sampled_estimate():
    w, ids = tiny_weights(), sequences(3)
    both = {
        name: fisher.accumulate(w, ids.split(2), tiny_predict(w), name, torch.Generator().manual_seed(7))
        for name in ("sampled", "rank1")
    }
    full, small = both["sampled"], both["rank1"]
    assert set(small.diagonal) == {"gain"}
    torch.testing.assert_close(small.diagonal["gain"], full.diagonal["gain"])
    for name in small.rows:
        torch.testing.assert_close(small.rows[name], full.diagonal[name].sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(small.columns[name], full.diagonal[name].sum(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(small.dense(name).sum(1), full.diagonal[name].sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(small.dense(name).sum(0), full.diagonal[name].sum(0), rtol=1e-12, atol=0)
    assert small.count() == full.count()
    assert small.total() == pytest.approx(full.total(), rel=1e-12)


@pytest.mark.parametrize("estimator", fisher.ESTIMATORS)
def test_hidden_states_and_head_give_the_same_as_logits(estimator):
    w, ids = tiny_weights(), sequences(2)

    def tiled(batch):
        dense = tiny_predict(w)(batch)
        head = tiled_head.Head(w["head"])
        return Prediction(hidden=tiny_hidden(w, batch), head=head, labels=dense.labels, sequence=dense.sequence)

    a, b = (
        fisher.accumulate(w, [ids], predict, estimator, torch.Generator().manual_seed(2))
        for predict in (tiny_predict(w), tiled)
    )
    for name in w:
        torch.testing.assert_close(a.dense(name), b.dense(name), rtol=1e-9, atol=1e-13)


def test_deterministic_and_leaves_gradients_alone():
    w, ids = tiny_weights(), sequences(2)
    first, second = (fisher.accumulate(w, [ids], tiny_predict(w)) for _ in range(2))
    other = fisher.accumulate(w, [ids], tiny_predict(w), generator=torch.Generator().manual_seed(9))
    assert all(torch.equal(first.diagonal[name], second.diagonal[name]) for name in w)
    assert not torch.equal(first.diagonal["head"], other.diagonal["head"])
    assert all(x.grad is None for x in w.values())
    assert not any(f.requires_grad for f in first.diagonal.values())


def test_unused_weights_get_zero_and_other_gradient_sources_work():
    w, ids = tiny_weights(), sequences(2)
    w["idle"] = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def by_backward(scalar, weights, keep_graph):
        scalar.backward(retain_graph=keep_graph)
        result = [x.grad for x in weights]
        for x in weights:
            x.grad = None
        return result

    plain = fisher.accumulate(w, [ids], tiny_predict(w))
    other = fisher.accumulate(w, [ids], tiny_predict(w), gradients=by_backward)
    assert not plain.diagonal["idle"].any()
    assert all(torch.equal(plain.diagonal[name], other.diagonal[name]) for name in w)


def test_float32_accumulators_for_low_precision():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    result = fisher.accumulate({"w": weight}, [torch.ones(2, 3).bfloat16()], lambda b: Prediction(b @ weight.T))
    assert result.diagonal["w"].dtype == torch.float32
    assert result.diagonal["w"].any()


@pytest.mark.parametrize("estimator", ["sampled", "rank1"])
def test_normalise_gives_mean_one_and_remembers_the_scale(estimator):
    w, ids = tiny_weights(), sequences(3)
    raw = fisher.accumulate(w, [ids], tiny_predict(w), estimator)
    before = {name: raw.dense(name).clone() for name in w}
    done = fisher.normalise(raw)
    weights = torch.cat([done.dense(name).flatten() for name in w])
    assert len(weights) == done.count()
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-12)
    for name in w:
        torch.testing.assert_close(done.dense(name) / done.scale, before[name], rtol=1e-10, atol=1e-16)


def test_errors():
    w, ids = tiny_weights(), sequences(1)
    predict = tiny_predict(w)
    with pytest.raises(ConfigError, match="sampled"):
        fisher.accumulate(w, [ids], predict, "sample")
    with pytest.raises(ConfigError, match="no weight"):
        fisher.accumulate({}, [ids], predict)
    with pytest.raises(ConfigError, match="'a' needs no gradient"):
        fisher.accumulate({"a": torch.ones(1)}, [ids], predict)
    with pytest.raises(ConfigError, match="top_k"):
        fisher.accumulate(w, [ids], predict, "sampled", top_k=3)
    with pytest.raises(DataError, match="no supervised token"):
        fisher.accumulate(w, [], predict)
    with pytest.raises(DataError, match="true labels"):
        fisher.accumulate(w, [ids], lambda b: Prediction(predict(b).logits), "empirical")
    with pytest.raises(ConfigError, match="either logits"):
        Prediction()
    with pytest.raises(ConfigError, match="0 protected"):
        fisher.normalise(fisher.Importance())
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="total importance"):
            fisher.normalise(fisher.Importance(diagonal={"w": torch.full((2,), bad)}))
