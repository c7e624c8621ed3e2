"""Strengths: schedules at their ends, layers from bottom to top, raw and normalised units."""

import math

import pytest
import torch

from retain.errors import ConfigError
from retain.functional import fisher, penalties, strengths


@pytest.mark.parametrize(
    ("kind", "end", "wanted"),
    [
        ("constant", None, lambda t: 3.0),
        ("linear", None, lambda t: 3.0 * (1 - 0.8 * t)),
        ("linear", 12.0, lambda t: 3.0 + 9.0 * t),
        ("rising", None, lambda t: 3.0 * (1 + t)),
        ("cosine", 1.0, lambda t: 2.0 + math.cos(math.pi * t)),
        ("cosine", None, lambda t: 2.0 + math.cos(math.pi * t)),
    ],
)
def test_schedules(kind, end, wanted):
    found = strengths.over_task(kind, 3.0, end)
    for t in (0.0, 0.2, 0.5, 1.0):
        assert found(t) == pytest.approx(wanted(t), rel=1e-12)


def test_custom_is_a_factor_and_may_be_larger_than_one():
    found = strengths.over_task("custom", 2.0, expression="10 * (1 - t)")
    assert [found(t) for t in (0, 0.5, 1)] == [20.0, 10.0, 0.0]


def test_mistakes_are_one_line():
    for arguments, text in (
        (("constant", 1.0, 2.0), "no end"),
        (("custom", 1.0, None, None), "expression"),
        (("custom", 1.0, 2.0, "t"), "no start and no end"),
        (("custom", 1.0, None, "t - 1"), "at least 0 and finite"),
        (("linear", 1.0, -1.0), "at least 0 and finite"),
        (("linear", math.inf), "at least 0 and finite"),
        (("linear", 1.0, None, "t"), "custom"),
        (("wavy", 1.0), "Allowed: constant"),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            strengths.over_task(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="by_layer: -1"):
        strengths.by_height(2.0, -1.0, 0.5)


def test_layers_lie_on_a_line():
    assert [strengths.by_height(2.0, 0.5, h) for h in (0, 0.5, 1)] == [2.0, 1.25, 0.5]


def test_recommended_falls_with_size_and_has_the_given_rows():
    assert strengths.recommended(8e9) == strengths.recommended(1e8) == ((1e-5, 5e-5), (1e4, 5e4))
    assert strengths.recommended(70e9) == ((5e-6, 1e-5), (5e3, 1e4))
    assert strengths.recommended(400e9) == ((1e-6, 5e-6), (1e3, 5e3))


def test_raw_and_normalised_units_pull_alike():
    torch.manual_seed(0)
    raw = torch.rand(7, 5).double() * 1e-9
    mean = float(raw.mean())
    weights, anchor = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    scaled = fisher.normalise(fisher.Importance(diagonal={"w": raw.clone()})).diagonal["w"]
    one = penalties.quadratic_value([weights], [anchor], [raw], 2e4)
    other = penalties.quadratic_value([weights], [anchor], [scaled], 2e4 * mean)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
