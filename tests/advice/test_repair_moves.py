"""Ways back to the base: endpoints, closed forms, and which tensors belong together."""

from __future__ import annotations

import pytest
import torch

from retain.advice.repair_moves import Grouped, Magnitude, Reduced, groups_of, plain
from retain.functional.intruders import intruders
from retain.models.merge_recipe import Pieces, Recipe


@pytest.fixture
def weights() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name → (base, tuned), in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> torch.Tensor:
        return scale * torch.randn(7, 5, generator=generator, dtype=torch.float64)

    found = {}
    for name, scale in (("model.layers.0.self_attn.q_proj.weight", 0.1), ("model.layers.1.mlp.up_proj.weight", 1.0)):
        start = draw(1.0)
        found[name] = (start, start + draw(scale))
    return found


def made(move, weights) -> dict[str, torch.Tensor]:
    """What a move makes, read in pieces of two rows."""
    found = {}
    for name, (start, final) in weights.items():
        spans = [slice(at, min(at + 2, 7)) for at in range(0, 7, 2)]
        pieces = Pieces(name, start.numel(), spans, [lambda r, w=final: w[r].clone()], lambda r, w=start: w[r].clone())
        found[name] = torch.cat([piece for _, piece in move.combine(pieces)])
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_share_for_all_groups_is_interpolation(weights, alpha):
    groups = groups_of(list(weights))
    alphas = dict.fromkeys(groups.values(), alpha)
    for name, found in made(Grouped(alphas, groups), weights).items():
        start, final = weights[name]
        torch.testing.assert_close(found, start + alpha * (final - start), rtol=0, atol=1e-12)
        torch.testing.assert_close(found, made(Recipe("interpolate", (alpha,)), weights)[name], rtol=0, atol=0)


def test_every_group_has_its_own_share(weights):
    groups = groups_of(list(weights))
    first, second = groups.values()
    found = made(Grouped({first: 0.0, second: 1.0}, groups), weights)
    (one, (start, _)), (two, (_, final)) = weights.items()
    torch.testing.assert_close(found[one], start, rtol=0, atol=0)
    torch.testing.assert_close(found[two], final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_magnitude_keeps_the_largest_of_all_tensors(weights, density):
    changes = torch.cat([(final - start).flatten() for start, final in weights.values()])
    move = Magnitude.keeping(density, len(changes), lambda: (f - s for s, f in weights.values()))
    kept = round(density * len(changes))
    least = changes.abs().sort(descending=True).values[kept - 1]
    found = made(move, weights)
    for name, (start, final) in weights.items():
        wanted = torch.where((final - start).abs() >= least, final, start)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-12)
    if density == 0.1:  # a tenth of the changes of the first, and all kept ones are of the second
        torch.testing.assert_close(found[next(iter(weights))], next(iter(weights.values()))[0], rtol=0, atol=0)


def test_trimming_a_tensor_keeps_its_own_largest(weights):
    for name, found in made(Recipe("ties", (1.0,), density=0.2), weights).items():
        start, final = weights[name]
        tau = final - start
        least = tau.abs().flatten().sort(descending=True).values[6]
        torch.testing.assert_close(found, start + tau.where(tau.abs() >= least, 0), rtol=0, atol=1e-12)


def test_intruders_are_taken_away(weights):
    found = {name: intruders(*pair, top=5, threshold=0.99) for name, pair in weights.items()}
    assert any(len(one.places) for one in found.values())
    nothing, whole = made(Reduced(found, 0.0), weights), made(Reduced(found, 1.0), weights)
    for name, (_, final) in weights.items():
        torch.testing.assert_close(nothing[name], final, rtol=0, atol=0)
        u, s, vh = torch.linalg.svd(final, full_matrices=False)
        rest = [i for i in range(5) if i not in found[name].places.tolist()]
        torch.testing.assert_close(whole[name], u[:, rest] * s[rest] @ vh[rest], rtol=0, atol=1e-12)


def test_groups_of_two_families():
    llama = ["model.embed_tokens.weight", "model.norm.weight"]
    parts = ("self_attn.q_proj", "input_layernorm", "post_attention_layernorm", "mlp.up_proj")
    llama += [f"model.layers.{i}.{part}.weight" for i in range(6) for part in parts]
    found = groups_of(llama)
    assert found["model.embed_tokens.weight"] == found["model.norm.weight"] == "embeddings"
    assert found["model.layers.0.input_layernorm.weight"] == found["model.layers.1.self_attn.q_proj.weight"]
    assert found["model.layers.5.post_attention_layernorm.weight"] == "upper mlp"
    assert found["model.layers.2.mlp.up_proj.weight"] == "middle mlp"
    assert len(set(found.values())) == 7
    gpt2 = ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.ln_1.bias",
            "transformer.h.1.ln_2.weight", "transformer.h.1.mlp.c_fc.weight"]  # fmt: skip
    assert [*groups_of(gpt2).values()] == ["embeddings", "lower attention", "lower attention", "upper mlp", "upper mlp"]


def test_plain_moves_have_names_of_their_own():
    names = [candidate.name for candidate in plain()]
    assert len(set(names)) == len(names)
    assert {candidate.family for candidate in plain()} == {"interpolate", "ties", "dare"}
