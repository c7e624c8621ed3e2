"""Averages of next-token distributions against numpy in float64, and what they do at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retain.errors import ConfigError
from retain.functional.ensembles import mixed, shares

LOGITS = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
def test_both_averages_are_their_definitions(weights):
    z = LOGITS.numpy()
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(mixed(LOGITS, weights).exp().numpy(), np.average(p, axis=0, weights=weights), rtol=1e-12)
    product = np.exp(np.average(np.log(p), axis=0, weights=weights))
    expected = product / product.sum(-1, keepdims=True)
    np.testing.assert_allclose(mixed(LOGITS, weights, "logits").exp().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_one_model_is_itself_and_equal_ones_are_one(average):
    one = torch.log_softmax(LOGITS[0], dim=-1)
    assert torch.equal(mixed(LOGITS[:1], [1.0], average), one)
    torch.testing.assert_close(mixed(LOGITS[:1].expand(3, -1, -1), [0.5, 0.2, 0.3], average), one)
    assert mixed(LOGITS[:1].bfloat16(), [1.0], average).dtype == torch.float32


def test_a_token_that_one_model_rules_out_stays_in_the_mixture_and_not_in_the_product():
    logits = torch.tensor([[0.0, 0.0], [0.0, -math.inf]])
    torch.testing.assert_close(mixed(logits, [0.5, 0.5]).exp(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(mixed(logits, [0.5, 0.5], "logits").exp(), torch.tensor([1.0, 0.0]))


def test_shares_are_the_largest_and_sum_to_one():
    assert shares({"a": 1, "b": 3, "c": 0}) == {"b": 0.75, "a": 0.25}
    assert shares({"a": 0.1, "b": 0.5, None: 0.3, "c": 0.1}, top=2) == {"b": 0.625, None: pytest.approx(0.375)}
    assert list(shares({"a": 1, "b": 1, "c": 1}, top=2)) == ["a", "b"]


@pytest.mark.parametrize(
    ("weights", "top", "words"),
    [
        ({"a": -1.0}, None, "-1.0 of 'a'"),
        ({"a": math.nan}, None, "nan of 'a'"),
        ({"a": 0.0}, None, "no weight is above zero"),
        ({}, None, "no weight"),
        ({"a": 1.0}, 0, "top = 0"),
    ],
)
def test_weights_that_are_refused(weights, top, words):
    with pytest.raises(ConfigError, match=words):
        shares(weights, top)
