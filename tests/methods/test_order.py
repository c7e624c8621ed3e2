"""Methods that change weights at the same moments: the order in which they are listed must not matter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from training_kit import rows, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods import build
from retain.methods.base import Stack
from retain.models import params

LORA = {"lora": {"r": 2}}


def both(entries, folder, **settings):
    """The trainings with the methods as listed and in reverse; lora first in both, as it makes the adapter."""
    for name, listed in (("one", entries), ("other", entries[::-1])):
        yield train(build([LORA, *listed]), folder / name, **settings)


@pytest.mark.parametrize(
    "entries",
    [
        [{"ilora": {"decay": 0.9}}, {"interpolate": {"strength": 0.5}}],
        [{"ilora": {"decay": 0.9}}, {"subspace": {"share": 0.5}}],
        [{"ilora": {"decay": 0.9}}, {"shield": {"share": 0.5}}],
        [{"ilora": {"decay": 0.9}}, "olora"],
        [{"distill": {"strength": 1.0, "teacher": "ema"}}, {"subspace": {"share": 0.5}}],
        [{"si": {"prior": 0.0}}, {"subspace": {"share": 0.5}}],
        [{"si": {"prior": 0.0}}, {"mofo": {"share": 0.1}}],
        [{"si": {"prior": 0.0}}, {"unfreeze": {"groups": 2}}],
        [{"ewc": {"strength": 1.0, "form": "proximal"}}, {"shield": {"share": 0.5}}],
        [{"l2sp": {"strength": 1.0, "form": "proximal"}}, {"subspace": {"share": 0.5}}],
    ],
    ids=lambda entries: "-".join(e if isinstance(e, str) else next(iter(e)) for e in entries),
)
def test_order_does_not_matter(entries, tmp_path):
    one, other = both(entries, tmp_path, weight_decay=0.1)
    assert same_bits(stored(one.model), stored(other.model))
    kept = [method.state_dict() for made in (one, other) for method in made.stack.methods if method.name == "si"]
    assert not kept or same_bits(*kept)


def test_interpolation_is_not_undone(tmp_path):
    for made in both([{"ilora": {"decay": 0.5}}, {"interpolate": {"strength": 1.0}}], tmp_path):
        for pair in params.lora_pairs(made.model).values():
            assert not pair.B.any()


@pytest.mark.parametrize("name", ["subspace", "shield"])
def test_a_slow_adapter_stays_where_the_steps_stay(name, tmp_path):
    """The average of steps that were projected is projected; the start of the average, too."""
    for made in both([{"ilora": {"decay": 0.9}}, {name: {"share": 0.5}}], tmp_path, steps=8, weight_decay=0.1):
        method = next(m for m in made.stack.methods if m.name == name)
        for held in method._held:
            parameter, start = held[:2]
            if name == "shield":
                assert torch.equal(torch.where(held[2], start, parameter), parameter)
                continue
            inside = method._inside(*held)
            assert float((parameter - inside).detach().norm()) <= 1e-6 * float(parameter.detach().norm())


@pytest.mark.parametrize("method", ["ewc", "mas"])
def test_importance_belongs_to_the_weights_that_remain(method, tmp_path):
    """What a task leaves for the next is taken where the next one is anchored, not before interpolation moved there."""
    from retain.methods.context import Run

    def importance(folder, entries):
        made = trainer(
            build(entries), folder / "task", steps=6,
            run=Run(folder / "task", "a", 1, shared=folder, new_rows=rows(8), say=lambda line: None),
        )  # fmt: skip
        made.train()
        return load_file(folder / method / "02.safetensors")

    settings = {method: {"strength": 1e-9, "decay": 0.0}}
    alone = importance(tmp_path / "alone", [settings])
    whole = importance(tmp_path / "whole", [settings, {"interpolate": {"strength": 1e-9}}])
    back = importance(tmp_path / "back", [settings, {"interpolate": {"strength": 1.0}}])
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(whole[name], alone[name], rtol=1e-3, atol=1e-4)
    assert float((back[name] - alone[name]).abs().mean()) > 0.01 * float(alone[name].abs().mean())


def test_si_of_a_task_that_is_taken_back_entirely_is_a_number(tmp_path):
    from retain.methods.context import Run

    run = Run(tmp_path / "task", "a", 1, shared=tmp_path, new_rows=rows(8), say=lambda line: None)
    trainer(build(["si", {"interpolate": {"strength": 1.0}}]), tmp_path / "task", run=run).train()
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(tmp_path / "si" / "02.safetensors").values())


@pytest.mark.parametrize("other", ["shield", "packnet"])
def test_directions_and_single_weights_cannot_both_be_held(other):
    with pytest.raises(ConfigError, match="subspace"):
        Stack(build(["subspace", other]))
