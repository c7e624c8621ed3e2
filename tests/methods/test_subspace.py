"""Subspace: the realised AdamW step stays outside; projecting gradients alone leaks."""

import pytest
import torch
from families import family_model, token_batch
from tiny import tiny_model, tiny_tokenizer
from training_kit import merged, rows, stored, train, trainer

from retain.errors import ConfigError
from retain.functional import projection
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.methods.subspace import Subspace
from retain.models import params, passes


def small(kind="llama"):
    return tiny_model(tiny_tokenizer(), kind=kind, num_hidden_layers=1)


def loop(model, method, steps, optimizer=torch.optim.AdamW, edit=lambda layers: None, **settings):
    """Training by hand on random tokens; the projected layers and their starting weights."""
    optimizer = optimizer(params.trainable(model).values(), lr=1e-2, **settings)
    run = Run(directory=None, model=model, moments=lambda p: dict(optimizer.state.get(p, {})), say=lambda line: None)
    if method is not None:
        method.on_model_ready(model, run)
    run.start, run.logging_now = params.snapshot(params.trainable(model)), False
    if method is not None:
        method.on_task_start(model, run)
    for step in range(steps):
        ids = token_batch(rows=2, length=8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        edit(model)
        if method is not None:
            method.edit_gradients(model, run)
        optimizer.step()
        if method is not None:
            method.on_step_end(model, run)
        optimizer.zero_grad()
    return optimizer


def leaks(before, after, share=0.5):
    """(‖UᵀΔ‖, ‖ΔV‖, ‖Δ‖) of the matrices of all blocks, largest; U and V from the weights before."""
    found = []
    for name, old in before.items():
        if ".layers." in name and old.dim() == 2:
            change = (after[name] - old).double()
            u, v = projection.large_directions(old, share)
            found.append((float((u.T @ change).norm()), float((change @ v).norm()), float(change.norm())))
    return [max(column) for column in zip(*found)]


def halves(model):
    """U and V of the larger half of the singular directions, by layer."""
    layers = passes.linear_layers(model)
    return {x.name: [side.float() for side in projection.large_directions(x.weight, 0.5)] for x in layers}


def test_after_200_steps_of_adamw_the_change_is_outside():
    model = small()
    before, bases = stored(model), halves(model)
    optimizer = loop(model, Subspace(), 200, weight_decay=0.1)
    left, right, size = leaks(before, stored(model))
    assert left < 1e-6
    assert right < 1e-6
    assert size > 1
    for layer in passes.linear_layers(model):
        moment = optimizer.state[layer.weight]["exp_avg"]
        u, v = bases[layer.name]
        assert float((u.T @ moment).norm()) + float((moment @ v).norm()) < 1e-5 * float(moment.norm())


def test_no_step_is_longer_than_the_learning_rate():
    """A projected first moment over a second moment that is not would divide by nothing where a gradient is 0."""
    model = small().double()
    before = stored(model)

    def in_one_row(model):
        for layer in passes.linear_layers(model):
            layer.weight.grad[1:] = 0

    loop(model, Subspace(), 12, edit=in_one_row, weight_decay=0.0)
    for layer in passes.linear_layers(model):
        change = (stored(model)[layer.name + ".weight"] - before[layer.name + ".weight"]).norm()
        assert 0 < change / layer.weight.numel() ** 0.5 < 12 * 1e-2


def test_projecting_gradients_alone_leaks():
    model = small()
    before, bases = stored(model), halves(model)

    def gradients_only(model):
        for layer in passes.linear_layers(model):
            layer.weight.grad = projection.off_subspace(layer.weight.grad, *bases[layer.name])

    loop(model, None, 60, edit=gradients_only, weight_decay=0.1)
    left, right, size = leaks(before, stored(model))
    assert left > 0.1 * size
    assert right > 0.1 * size


def test_large_singular_values_and_what_they_map_stay():
    model = small().double()
    before = stored(model)
    loop(model, Subspace(share=0.25), 20)
    after = stored(model)
    for layer in passes.linear_layers(model):
        name = layer.name + ".weight"
        u, s, vt = torch.linalg.svd(before[name], full_matrices=False)
        count = len(s) // 4
        torch.testing.assert_close(after[name] @ vt[:count].T, u[:, :count] * s[:count])
        torch.testing.assert_close(u[:, :count].T @ after[name], s[:count, None] * vt[:count])
        values = torch.linalg.svdvals(after[name])
        assert all(float((values - value).abs().min()) < 1e-9 for value in s[:count])
        assert not torch.allclose(after[name], before[name])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_over_plain_descent_it_is_projected_descent(momentum):
    model, other = small().double(), small().double()
    bases = {layer.name: projection.large_directions(layer.weight, 0.5) for layer in passes.linear_layers(other)}

    def project(model):
        for layer in passes.linear_layers(model):
            layer.weight.grad = projection.off_subspace(layer.weight.grad, *bases[layer.name]).detach()

    loop(model, Subspace(), 10, torch.optim.SGD, momentum=momentum)
    loop(other, None, 10, torch.optim.SGD, edit=project, momentum=momentum)
    for name, weight in stored(other).items():
        torch.testing.assert_close(stored(model)[name], weight)


def test_with_every_direction_kept_no_matrix_moves():
    model = small().double()
    before = stored(model)
    loop(model, Subspace(share=1.0), 5, weight_decay=0.1)
    size = leaks(before, stored(model))[2]
    assert size < 1e-13
    assert not torch.equal(stored(model)["lm_head.weight"], before["lm_head.weight"])


def test_with_lora_the_product_is_outside():
    model = small()
    before = stored(model)
    model = LoRA(r=4).prepare_model(model, Run(directory=None))
    optimizer = loop(model, Subspace(), 200, weight_decay=0.1)
    left, right, size = leaks(before, merged(model))
    assert size > 0.5
    assert left < 1e-5, "the sum W + s·BA is rounded once more"
    assert right < 1e-5
    for layer in passes.linear_layers(model):
        u, v = projection.large_directions(layer.weight.detach(), 0.5)
        product = (layer.pair.scaling * layer.pair.B @ layer.pair.A).detach().double()
        assert float((u.T @ product).norm()) < 1e-6
        assert float((product @ v).norm()) < 1e-6
        moment = optimizer.state[layer.pair.A]["exp_avg"].double()
        assert float((moment @ v).norm()) < 1e-5 * float(moment.norm())


def energy_left(model, made, basis):
    """Largest share of the energy of old inputs outside a basis, over layers."""
    layers = passes.linear_layers(model)
    batches = list(made.run.batches(made.run.old, 4))
    sums = passes.input_sums(model, layers, batches, True, skip_first=True)
    return max(
        1 - float(torch.trace(basis[layer.name].T @ sums[layer.name] @ basis[layer.name]) / sums[layer.name].trace())
        for layer in layers
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_directions_of_old_inputs_are_not_changed(kind, tmp_path):
    base = tiny_model(tiny_tokenizer(), kind=kind)
    before = stored(base)
    made = train([Subspace(share=0.0, energy=0.9)], tmp_path, base, weight_decay=0.1)
    method = made.stack.methods[0]
    known, layers = method._known, passes.linear_layers(made.model)
    assert energy_left(tiny_model(tiny_tokenizer(), kind=kind), made, known) < 0.1 + 1e-5
    after = stored(made.model)
    for layer in layers:
        change = layer.oriented(after[layer.name + ".weight"] - before[layer.name + ".weight"])
        assert float((change @ known[layer.name]).norm()) < 1e-5
        assert float(change.norm()) > 1e-3


def test_directions_of_earlier_tasks_are_kept_and_grow(tmp_path):
    def task(index, new, restored=False):
        folder = tmp_path / f"{index}"
        run = Run(folder, task=f"t{index}", task_index=index, shared=tmp_path, new_rows=new, say=lambda line: None)
        settings = {"share": 0.25, "energy": 0.6}
        return train([LoRA(r=2), Subspace(**settings)], folder, steps=1, run=run).stack.methods[1]._known

    first = task(1, rows(6, 40))
    second = task(2, rows(6, 40))
    assert first.keys() == second.keys()
    for name, basis in first.items():
        assert torch.equal(second[name][:, : basis.shape[1]], basis)
        torch.testing.assert_close(second[name].T @ second[name], torch.eye(second[name].shape[1]), atol=1e-5, rtol=0)
    assert not list(tmp_path.rglob("*.part"))


def test_free_directions_are_said(tmp_path):
    made = trainer([Subspace(share=0.25)], tmp_path)
    said = []
    made.run.say = said.append
    made.stack.on_model_ready(made.model, made.run)
    shapes = [layer.shape for layer in passes.linear_layers(made.model)]
    free = sum(1 - round(0.25 * min(shape)) / shape[1] for shape in shapes) / 14
    assert said[-1] == f"subspace: 14 weights are held; {free:.0%} of input directions stay free."


@pytest.mark.parametrize(
    ("case", "match"), [("dora", "DoRA scales"), ("learned", "learned before"), ("frozen", "no lin")]
)
def test_what_cannot_be_held_is_an_error(case, match):
    model = family_model("llama")
    if case != "frozen":
        model = LoRA(r=2, dora=case == "dora").prepare_model(model, Run(directory=None))
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and (case != "frozen" or "norm" in name))
    if case == "learned":
        with torch.no_grad():
            next(t for name, t in model.named_parameters() if "lora_B" in name)[0, 0] = 1
    with pytest.raises(ConfigError, match=rf"methods\.subspace: .*{match}") as caught:
        Subspace().on_model_ready(model, Run(directory=None))
    assert "\n" not in str(caught.value)
