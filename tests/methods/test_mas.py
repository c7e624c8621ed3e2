"""MAS: one gradient per row of the squared centred logits, its absolute value averaged over rows."""

import copy

import pytest
import torch
from families import FAMILIES, family_model, token_batch
from safetensors.torch import load_file
from training_kit import LAYOUTS, distance, finite, rows, same_bits, stored, texts, train, trainer

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.l2sp import L2SP
from retain.methods.lora import LoRA
from retain.methods.mas import MAS
from retain.models import params
from retain.models.pull import product_keys


def by_hand(made, data, weights):
    """Ω from the model's own logits, row by row; scaled to mean 1."""
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for inputs, labels in made.run.batches(data, 1):
        with params.evaluating(made.model):
            z = params.causal(made.model)(**inputs).logits[0, :-1][labels[0, 1:] != -100]
        size = (z - z.mean(-1, keepdim=True)).square().sum()
        for name, slope in zip(weights, torch.autograd.grad(size, list(weights.values()))):
            total[name] += slope.abs()
    count, whole = sum(t.numel() for t in total.values()), sum(float(t.sum()) for t in total.values())
    return {name: t * count / whole for name, t in total.items()}


def test_importance_is_the_formula(tmp_path, model):
    made = trainer([MAS()], tmp_path, model.double())
    wanted = by_hand(made, rows(5), params.trainable(made.model))
    with params.evaluating(made.model):
        found = MAS().importance(made.model, made.run, rows(5))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lora", [False, True])
def test_it_knows_nothing_of_how_rows_are_flattened_or_packed(lora, tmp_path, model):
    found = {}
    for layout, settings in LAYOUTS.items():
        methods = [*([LoRA(r=2)] if lora else []), MAS()]
        made = trainer(methods, tmp_path / layout, copy.deepcopy(model).double(), **settings)
        found[layout] = MAS().importance(made.model, made.run, texts(7))
    for layout, importance in found.items():
        assert distance(importance, found["rows"]) < 1e-6, layout


def test_with_lora_it_has_the_row_and_column_sums_of_the_base(tmp_path, model):
    made = trainer([LoRA(r=2), MAS()], tmp_path, model.double())
    pairs = params.lora_pairs(made.model)
    flags = {name: p.requires_grad for name, p in made.model.named_parameters()}
    with params.evaluating(made.model):
        found = MAS().importance(made.model, made.run, rows(4))
    assert {name: p.requires_grad for name, p in made.model.named_parameters()} == flags
    bases = {name: pair.base for name, pair in pairs.items()}
    for base in bases.values():
        base.requires_grad_(True)
    wanted = by_hand(made, rows(4), bases)
    for name in bases:
        for key, axis in zip(product_keys(name), (1, 0)):
            torch.testing.assert_close(found[key], wanted[name].sum(axis), rtol=1e-5, atol=1e-9)


def test_conv1d_bases_are_turned():
    model = LoRA(r=2).prepare_model(family_model("gpt2").double(), Run(directory=None))
    ids = token_batch(1)
    run = Run(directory=None, batches=lambda data, size: iter([({"input_ids": ids}, ids)]))
    found = MAS().importance(model, run, rows(1))
    for name, pair in params.lora_pairs(model).items():
        assert pair.transposed
        assert found[product_keys(name)[0]].shape == (pair.B.shape[0],)
        assert found[product_keys(name)[1]].shape == (pair.A.shape[1],)


def test_labels_are_not_read(tmp_path):
    """Other labels at the same positions: the same importance."""
    model, ids = family_model("llama").double(), token_batch(2)

    def importance(labels):
        run = Run(directory=None, batches=lambda data, size: iter([({"input_ids": ids}, labels)]))
        return MAS().importance(model, run, rows(2))

    assert same_bits(importance(ids), importance((ids + 5) % 80))


def test_families_have_an_importance_for_every_weight_that_acts():
    for kind in FAMILIES:
        model, ids = family_model(kind), token_batch(1)
        run = Run(directory=None, batches=lambda data, size, ids=ids: iter([({"input_ids": ids}, ids)]))
        found = MAS().importance(model, run, rows(1))
        silent = [name for name, t in found.items() if not t.any() and "k_proj.bias" not in name]
        assert not silent, (kind, silent)


def test_importance_of_one_is_l2sp(tmp_path, monkeypatch):
    held = stored(train([L2SP(strength=0.5)], tmp_path / "l2sp").model)

    def ones(self, model, run, data):
        return {name: torch.ones_like(p) for name, p in params.trainable(model).items()}

    monkeypatch.setattr(MAS, "importance", ones)
    assert distance(stored(train([MAS(strength=0.5)], tmp_path / "mas").model), held) < 1e-6


def test_gradient_is_strength_times_importance_times_distance(tmp_path):
    made = train([MAS(strength=0.3)], tmp_path)
    importance = load_file(tmp_path / "mas" / "01.safetensors")
    for p in params.trainable(made.model).values():
        p.grad = torch.zeros_like(p)
    made.stack.methods[0].edit_gradients(made.model, made.run)
    for name, p in params.trainable(made.model).items():
        torch.testing.assert_close(p.grad, 0.3 * importance[name] * (p.detach() - made.run.start[name]))


def test_proximal_at_a_huge_strength_keeps_what_matters(tmp_path, model):
    start = stored(model)
    made = train([MAS(strength=1e12, form="proximal")], tmp_path)
    assert finite(made.model)
    importance, after = load_file(tmp_path / "mas" / "01.safetensors"), stored(made.model)
    kept = {name: importance[name] > 1e-6 for name in start}
    assert sum(int(k.sum()) for k in kept.values()) > 1000
    assert all(float((after[n] - start[n])[kept[n]].abs().max()) < 1e-5 for n in start if kept[n].any())


def test_the_next_task_adds_the_importance_of_this_one(tmp_path):
    def run(index):
        return Run(tmp_path / str(index), task=f"task {index}", task_index=index, shared=tmp_path,
                   new_rows=rows(6, index), say=lambda line: None)  # fmt: skip

    first = train([MAS(samples=4)], tmp_path / "1", run=run(1))
    old, both = (load_file(tmp_path / "mas" / f"0{i}.safetensors") for i in (1, 2))
    with params.evaluating(first.model):
        new = MAS(samples=4).importance(first.model, first.run, rows(6, 1))
    assert distance(both, {name: old[name] + new[name] for name in old}) < 1e-3
    first.release()
    second = train([MAS(samples=4)], tmp_path / "2", first.model, run=run(2))
    method = second.stack.methods[0]
    assert same_bits(method._importance, both)
    names = list(params.outside_lora(second.model))
    assert same_bits(dict(zip(names, method.pull._importance)), both)


def test_settings_that_cannot_work_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.mas\.strength: .*form: proximal"):
        train([MAS(strength=1e5)], tmp_path, optim="sgd")
    with pytest.raises(ConfigError, match="samples"):
        MAS(samples=0)
