"""Shares and rules of merging against closed forms, hand-computed numbers, numpy and PEFT's own functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from retain.functional.task_vectors import (
    cosine,
    drop,
    elect,
    gram,
    kept_entries,
    kth_magnitude,
    spherical,
    stock,
    trim,
)


def vectors(*rows: list[float]) -> torch.Tensor:
    return gram([torch.tensor(rows, dtype=torch.float64).unbind()])


def test_inner_products_come_together_from_pieces():
    whole = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    parts = [[row[at : at + 7] for row in whole] for at in range(0, 50, 7)]
    expected = whole.double().numpy() @ whole.double().numpy().T
    np.testing.assert_allclose(gram(parts).numpy(), expected, rtol=1e-12)
    assert cosine(gram(parts), 0, 1) == pytest.approx(expected[0, 1] / math.sqrt(expected[0, 0] * expected[1, 1]))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_slerp_turns_in_the_plane_at_constant_speed(share):
    """Between (1, 0) and (cos Ω, sin Ω) it is (cos tΩ, sin tΩ)."""
    angle = 2.0
    one, other = [1.0, 0.0], [math.cos(angle), math.sin(angle)]
    a, b = spherical(vectors(one, other), share)
    assert a * one[0] + b * other[0] == pytest.approx(math.cos(share * angle))
    assert a * one[1] + b * other[1] == pytest.approx(math.sin(share * angle))


def test_slerp_at_its_ends_and_without_a_plane():
    products = vectors([1, 2, 3], [3, -1, 0.5])
    assert spherical(products, 0) == (1, 0)
    assert spherical(products, 1) == (0, 1)
    for other in ([2, 4], [-1, -2], [0, 0]):
        assert spherical(vectors([1, 2], other), 0.3) == (0.7, 0.3)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, math.pi / 2])
def test_model_stock_of_two_is_its_closed_form(angle):
    products = vectors([2, 0], [3 * math.cos(angle), 3 * math.sin(angle)])
    assert stock(products) == pytest.approx(2 * math.cos(angle) / (1 + math.cos(angle)), abs=1e-12)


def test_model_stock_is_the_point_of_the_plane_nearest_to_the_true_centre():
    """n changes c + eᵢ with noise of one length, at right angles: the foot of the base on their plane is t · mean."""
    noise, centre = 0.7, 1.3
    changes = [[centre, *(noise if i == j else 0.0 for j in range(4))] for i in range(4)]
    mean = np.array([centre, *[noise / 4] * 4])
    across = [np.array(row) - mean for row in changes]
    share = stock(vectors(*changes))
    towards = (
        np.array([centre, 0, 0, 0, 0]) - share * mean
    )  # from the merged model to the centre of all fine-tuned ones
    assert share * mean @ towards == pytest.approx(0, abs=1e-12)
    assert all(abs(row @ mean) < 1e-12 for row in across)


def test_model_stock_of_changes_with_nothing_in_common_is_the_base():
    assert stock(vectors([1, 0], [-1, 0.5])) == 0
    assert stock(vectors([0, 0], [1, 0])) == 0
    assert stock(vectors([1, 0, 0], [1, 0, 0], [1, 0, 0])) == pytest.approx(1)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_kth_magnitude_is_that_of_sorting(kind):
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(1000, generator=generator, dtype=kind) * 10.0 ** torch.randint(
        -30, 30, (1000,), generator=generator
    )
    whole[::7] = 0.0
    whole[3:40] = -whole[2]  # many of one magnitude
    ordered = whole.abs().sort(descending=True).values
    for k in (1, 2, 37, 500, 999, 1000):
        found = kth_magnitude(lambda: (part.reshape(-1, 1) for part in whole.split(300)), k)
        assert found.dtype == kind
        assert float(found) == float(ordered[k - 1])


@pytest.mark.parametrize("k", [0, 6])
def test_a_rank_that_is_not_there_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} of 5"):
        kth_magnitude(lambda: [torch.ones(5)], k)


def test_how_many_entries_a_density_keeps():
    assert [kept_entries(100, d) for d in (1.0, 0.29, 0.001)] == [100, 29, 1]
    assert kept_entries(0, 0.5) == 0


def test_ties_on_an_example_by_hand():
    one, other = torch.tensor([4.0, -3.0, 1.0, 2.0, 0.5]), torch.tensor([2.0, 5.0, -1.0, -2.0, 0.1])
    trimmed = [trim(tau, kth_magnitude(lambda tau=tau: [tau], 3)) for tau in (one, other)]
    assert [tau.tolist() for tau in trimmed] == [[4, -3, 0, 2, 0], [2, 5, 0, -2, 0]]
    # mean of both; +5 outweighs −3; nobody; 2 against 2 is a tie and positive; nobody
    assert elect(trimmed, [1, 1]).tolist() == [3, 5, 0, 2, 0]
    # with weights 2 to 1: 10/3; −6 outweighs 5; 4 outweighs −2
    torch.testing.assert_close(elect(trimmed, [2, 1]), torch.tensor([10 / 3, -3, 0, 2, 0]))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.75])
def test_ties_is_that_of_peft(density):
    taus = list(torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(2)))
    kept = kept_entries(400, density)
    trimmed = [trim(tau, kth_magnitude(lambda tau=tau: [tau], kept)) for tau in taus]
    expected = merge_utils.ties(taus, torch.ones(3), density)
    torch.testing.assert_close(elect(trimmed, [1, 1, 1]), expected)
    torch.testing.assert_close(elect(trimmed, [0.3] * 3), expected)  # only ratios count


def test_dare_keeps_the_expectation_and_the_share_and_the_variance_of_a_coin():
    tau, density = torch.tensor([1.0, -2.0, 0.5, 0.0]), 0.3
    draws = torch.stack([drop(tau, density, torch.Generator().manual_seed(seed)) for seed in range(4000)])
    error = tau.abs() * math.sqrt((1 - density) / density / 4000)
    assert bool(((draws.mean(0) - tau).abs() <= 4 * error).all())
    assert float((draws[:, 0] != 0).float().mean()) == pytest.approx(density, abs=0.03)
    assert set(draws[:, 0].tolist()) == {0.0, float(torch.tensor(1.0) / density)}
    assert drop(tau, 1, torch.Generator()) is tau
