"""Merging one tensor piece by piece, against slow references in float64; settings that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from retain.errors import ConfigError
from retain.models.merge_recipe import METHODS, Pieces, recipe

SHAPE = (12, 5)


def tensors(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(SHAPE, generator=generator)
    shared = torch.randn(SHAPE, generator=generator)  # changes point the same way in part, as those of one base do
    return start, [start + shared + torch.randn(SHAPE, generator=generator) for _ in range(count)]


def merged(
    method: str, models: list[torch.Tensor], start: torch.Tensor | None, height: int = 4, **settings
) -> torch.Tensor:
    made, used = recipe(method, len(models), base=start is not None, **settings)
    spans = [slice(at, min(at + height, SHAPE[0])) for at in range(0, SHAPE[0], height)]

    def reader(tensor: torch.Tensor):
        return lambda rows: tensor[rows].clone()

    before = None if start is None or method == "linear" else reader(start)
    pieces = Pieces("w", math.prod(SHAPE), spans, [reader(models[i]) for i in used], before)
    return torch.cat([piece for _, piece in made.combine(pieces)])


def slow(method: str, models: list[torch.Tensor], start: torch.Tensor | None, weights: list[float]) -> np.ndarray:
    """The definitions, written once more, with numpy in float64."""
    thetas = np.stack([model.double().numpy() for model in models])
    if method == "linear":
        return np.average(thetas, axis=0, weights=weights)
    origin = np.zeros(SHAPE) if start is None else start.double().numpy()
    taus = thetas - origin
    flat = taus.reshape(len(taus), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    if method == "slerp":
        t = weights[1] / sum(weights)
        omega = np.arccos(unit[0] @ unit[1])
        return origin + (np.sin((1 - t) * omega) * taus[0] + np.sin(t * omega) * taus[1]) / np.sin(omega)
    if method == "stock":
        n = len(taus)
        cos = np.mean([unit[i] @ unit[j] for i in range(n) for j in range(n) if i != j])
        return origin + n * cos / (1 + (n - 1) * cos) * taus.mean(0)
    if method == "ties":
        kept = np.zeros_like(flat)
        for tau, out in zip(flat, kept):
            best = np.argsort(-np.abs(tau))[: round(0.4 * tau.size)]
            out[best] = tau[best]
        w = np.array(weights)[:, None]
        agree = np.sign(kept) == np.where((w * kept).sum(0) >= 0, 1, -1)
        mean = (w * kept * agree).sum(0) / np.maximum((w * agree).sum(0), 1e-300)
        return origin + mean.reshape(SHAPE)
    return origin + np.tensordot(np.array(weights), taus, 1)


CASES = [
    *[(method, 2, [0.3, 0.7]) for method in ("linear", "slerp", "task", "ties")],
    *[(method, 3, [0.2, 0.3, 0.9]) for method in ("linear", "task", "ties")],
    ("task", 2, [0.5, -0.5]),
    ("interpolate", 1, [0.3]),
    ("stock", 2, []),
    ("stock", 4, []),
]


@pytest.mark.parametrize(("method", "count", "weights"), CASES)
def test_against_the_definition_in_float64(method, count, weights):
    start, models = tensors(count)
    more = {"density": 0.4} if method == "ties" else {}
    found = merged(method, models, start, weights=weights or None, **more)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), slow(method, models, start, weights), rtol=1e-5, atol=1e-5)


def test_slerp_without_a_base_is_between_the_weights_themselves():
    _, models = tensors(2)
    expected = slow("slerp", models, None, [0.5, 0.5])
    np.testing.assert_allclose(merged("slerp", models, None).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "slerp", "task", "ties", "dare"])
@pytest.mark.parametrize("place", [0, 1])
def test_weight_one_on_one_model_is_that_model_bit_for_bit(method, place):
    start, models = tensors(2)
    density = {"density": 1.0} if method in ("ties", "dare") else {}
    weights = [1.0 - place, float(place)]
    assert torch.equal(merged(method, models, start, weights=weights, **density), models[place])


def test_interpolation_at_its_ends_is_bit_for_bit():
    start, models = tensors(1)
    assert torch.equal(merged("interpolate", models, start, weights=[1]), models[0])
    assert torch.equal(merged("interpolate", models, start, weights=[0]), start)
    assert torch.equal(merged("task", models * 2, start, weights=[0, 0]), start)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "interpolate"])
def test_equal_models_are_not_rounded_away_from_themselves(method):
    start, _ = tensors(1)
    count = 2 if method == "slerp" else 3
    assert torch.equal(merged(method, [start] * count, start), start)
    if method in ("linear", "slerp"):
        assert torch.equal(merged(method, [start] * count, None), start)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dare"])  # its draws follow the pieces, of fixed size
@pytest.mark.parametrize("height", [1, 5])
def test_pieces_do_not_matter(method, height):
    start, models = tensors({"interpolate": 1, "slerp": 2}.get(method, 3))
    torch.testing.assert_close(merged(method, models, start, height), merged(method, models, start, 12))


def test_dare_is_task_arithmetic_at_density_one_and_in_the_mean():
    start, models = tensors(2)
    task = merged("task", models, start, weights=[0.5, 0.25])
    assert torch.equal(merged("dare", models, start, weights=[0.5, 0.25], density=1.0), task)
    draws = torch.stack([merged("dare", models, start, weights=[0.5, 0.25], density=0.5, seed=s) for s in range(1000)])
    spread = torch.stack([(m - start) * w for m, w in zip(models, (0.5, 0.25))]).square().sum(0).sqrt()
    assert float(((draws.mean(0) - task).abs() / (spread / math.sqrt(1000))).max()) < 5
    again = merged("dare", models, start, weights=[0.5, 0.25], density=0.5, seed=7)
    assert torch.equal(again, draws[7])
    assert not torch.equal(again, draws[8])


def test_models_and_tensors_draw_apart():
    """Else the same entries of all models would be dropped, and their sum would vary more."""
    start, models = tensors(1)
    doubled = merged("dare", models * 2, start, weights=[1, 1], density=0.5) - start
    factors = (doubled / (models[0] - start)).round()
    assert {0.0, 2.0, 4.0} == set(factors.flatten().tolist())


def test_sums_are_those_of_peft():
    start, models = tensors(3)
    taus = [model - start for model in models]
    expected = start + merge_utils.task_arithmetic(taus, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(merged("task", models, start, weights=[0.1, 0.2, 0.3]), expected)
    expected = start + 0.5 * merge_utils.ties(taus, torch.ones(3), 0.4)
    torch.testing.assert_close(merged("ties", models, start, density=0.4, scale=0.5), expected)


@pytest.mark.parametrize(
    ("method", "count", "settings", "words"),
    [
        ("tie", 2, {}, "Did you mean 'ties'"),
        ("linear", 1, {}, "1 given; it takes two models or more"),
        ("slerp", 3, {}, "3 given; it takes two models"),
        ("interpolate", 2, {}, "2 given; it takes one model"),
        ("task", 2, {"base": False}, "Give it with --base"),
        ("linear", 2, {"weights": [1.0]}, "1 given for 2 models"),
        ("linear", 2, {"weights": [1, -1]}, "-1 given; allowed with --method linear: 0 or more"),
        ("linear", 2, {"weights": [0, 0]}, "all are zero"),
        ("task", 2, {"weights": [1, math.nan]}, "nan given"),
        ("interpolate", 1, {"weights": [1.5]}, "0 (the base) to 1 (the model)"),
        ("stock", 2, {"weights": [1, 1]}, "--weights: does nothing with --method stock"),
        ("task", 2, {"density": 0.5}, "--density: does nothing with --method task; it is for ties, dare"),
        ("slerp", 2, {"scale": 0.5}, "--scale: does nothing"),
        ("ties", 2, {"density": 0.0}, "--density: 0 given"),
        ("dare", 2, {"density": 1.5}, "--density: 1.5 given"),
        ("dare", 2, {"scale": math.inf}, "--scale: inf given"),
    ],
)
def test_settings_that_are_refused(method, count, settings, words):
    with pytest.raises(ConfigError) as refused:
        recipe(method, count, **settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
