"""On a GPU everything is as on the CPU: weights, scores, and going on after a kill. Run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from run_kit import carry_out
from training_kit import ON_GPU, distance, finite, merged, train

from retain import methods
from retain.pipeline import load_run
from retain.probes.asking import ask
from retain.probes.base import Subject
from retain.probes.suite import load_probes

pytestmark = pytest.mark.skipif(not (ON_GPU and torch.cuda.is_available()), reason="make test-gpu, on a GPU")
#: Methods whose selection or noise comes from values that differ in the last bits between devices.
CHAOTIC = {"sdft"}


@pytest.mark.parametrize("name", [name for name in methods.names() if name not in CHAOTIC])
def test_weights_as_on_the_cpu(name, tmp_path):
    """Four steps of 1e-2 end within 1e-4: weights are float64 and Adam's epsilon is above rounding errors, but the
    head multiplies in float32, and where a method divides by a small norm that is seen."""
    from tiny import tiny_model, tiny_tokenizer

    def end(device: str) -> dict[str, torch.Tensor]:
        model = tiny_model(tiny_tokenizer()).double()
        settings = {"use_cpu": device == "cpu", "adam_epsilon": 1e-4, "optim": "adamw_torch"}
        made = train([methods.load(name)()], tmp_path / device, model, **settings)
        assert next(made.model.parameters()).device.type == device
        return merged(made.model)

    assert distance(end("cuda"), end("cpu")) < 1e-4


@pytest.mark.parametrize("name", methods.names())
def test_two_tasks_in_bfloat16(name, shop, tmp_path):
    """A whole run with the settings that a GPU gets by default: learned, probed, saved and loaded again."""
    train = {"per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 1e-3, "max_steps": 3}
    results, _ = carry_out(shop, tmp_path / "run", methods=[name], train=train)
    assert [s.steps for s in results.training] == [3, 3]
    model, tokenizer = load_run(tmp_path / "run")
    assert finite(model)
    probe = load_probes(str(shop / "probes.jsonl"))[0]
    assert len(ask([probe], Subject(model.cuda(), tokenizer))) == len(probe.items)
