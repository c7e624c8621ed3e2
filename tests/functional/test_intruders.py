"""Intruder dimensions: planted ones are found and removed; PEFT's own reduction does the same."""

from __future__ import annotations

import pytest
import torch
from merge_kit import write_adapter, write_model
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from transformers import AutoModelForCausalLM

from retain.functional.intruders import intruders


def basis(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


@pytest.fixture
def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A base of rank 4 and the same with a direction outside of it: (base, tuned, what was planted)."""
    u, v = basis(12, 5, 0), basis(9, 5, 1)
    sizes = torch.tensor([5.0, 4, 3, 2], dtype=torch.float64)
    start = u[:, :4] * sizes @ v[:, :4].T
    # the base has as many singular vectors as columns: fill them up with tiny ones that the planted one is not near to
    start += 1e-9 * torch.randn(12, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    extra = 4.5 * u[:, 4:] @ v[:, 4:].T
    return start, start + extra, extra


def test_a_planted_direction_is_found_at_its_place(planted):
    start, final, extra = planted
    known = torch.linalg.svd(start, full_matrices=False).U
    nearest = float((torch.linalg.svd(final).U[:, 1] @ known).abs().max())
    found = intruders(start, final, top=4, threshold=nearest + 0.01)
    assert found.places.tolist() == [1]  # 5, then 4.5, then 4
    torch.testing.assert_close(found.left @ found.right, extra, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(final - found.left @ found.right, start, atol=1e-6, rtol=1e-6)
    assert not len(intruders(start, final, top=1, threshold=nearest + 0.01).places)  # not among the largest one


def test_a_matrix_has_no_intruders_of_its_own(planted):
    start, final, _ = planted
    assert not len(intruders(start, start, top=9, threshold=0.999).places)
    assert not len(intruders(start, final, threshold=0.0).places)
    assert intruders(start, final, top=9, threshold=1.01).left.shape == (12, 9)


def test_peft_does_the_same(tmp_path):
    base = write_model(tmp_path / "base", 0)
    adapter = write_adapter(tmp_path / "adapter", base, 1)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    start = {name: p.clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    layers = {
        name.removesuffix(".base_layer.weight"): model.get_submodule(name.removesuffix(".base_layer.weight"))
        for name in start
    }
    changes = {name: layer.get_delta_weight("default").detach().clone() for name, layer in layers.items()}
    settings = {"top_k": 6, "threshold_epsilon": 0.6, "mitigation_lambda": 0.75}
    reduce_intruder_dimension(model, logging_sink=None, **settings)
    some = 0
    for name, layer in layers.items():
        before = start[f"{name}.base_layer.weight"].detach()
        found = intruders(before, before + changes[name], top=6, threshold=0.6)
        some += len(found.places)
        u, s, vh = torch.linalg.svd(changes[name] - 0.25 * found.left @ found.right, full_matrices=False)
        wanted = u[:, :4] * s[:4] @ vh[:4]  # to the rank of the adapter
        torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), wanted, rtol=1e-3, atol=1e-3)
    assert some
