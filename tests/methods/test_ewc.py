"""EWC: the Fisher is the enumerated one, the pull is strength·F·(θ − θ*), with LoRA on the product."""

import copy

import pytest
import torch
from datasets import concatenate_datasets
from families import family_model
from safetensors.torch import load_file
from training_kit import LAYOUTS, distance, finite, rows, same_bits, stored, texts, train, trainer

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.ewc import EWC
from retain.methods.l2sp import L2SP
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.models import params
from retain.models.pull import product_keys


def enumerated(made, data, weights):
    """F by brute force: every token, every label, p·(∂ log p)²; scaled to mean 1. Slow and independent."""
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for inputs, labels in made.run.batches(data, 1):
        with params.evaluating(made.model):
            log_p = torch.log_softmax(params.causal(made.model)(**inputs).logits, -1)[0, :-1]
        for position in (labels[0, 1:] != -100).nonzero()[:, 0].tolist():
            every = torch.eye(log_p.shape[1], dtype=log_p.dtype)
            slopes = torch.autograd.grad(
                log_p[position], list(weights.values()), every, retain_graph=True, is_grads_batched=True
            )
            p = log_p[position].detach().exp()
            for name, slope in zip(weights, slopes):
                total[name] += torch.einsum("v,v...->...", p, slope.square())
    count, whole = sum(t.numel() for t in total.values()), sum(float(t.sum()) for t in total.values())
    return {name: t * count / whole for name, t in total.items()}


@pytest.fixture(scope="module")
def few():
    return rows(1, 1)


@pytest.fixture
def exact(few, tmp_path, model):
    """A trainer over a float64 model with dense EWC, and the enumerated F of its rows."""
    made = trainer([EWC()], tmp_path, model.double())
    weights = params.trainable(made.model)
    return made, enumerated(made, few, weights)


def shares(importance):
    """Share of each tensor in the whole importance."""
    whole = sum(float(t.sum()) for t in importance.values())
    return {name: float(t.sum()) / whole for name, t in importance.items()}


def test_exact_estimator_is_the_enumerated_fisher(exact, few):
    made, wanted = exact
    found = EWC(estimator="exact").importance(made.model, made.run, few)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-9)
    assert sum(float(t.sum()) for t in found.values()) == pytest.approx(sum(t.numel() for t in found.values()))


@pytest.mark.parametrize("batch_size", [2, 12])
def test_sampled_fisher_converges_to_it_for_every_batch_size(exact, few, batch_size):
    made, wanted = exact
    many = concatenate_datasets([few] * (150 * batch_size))  # 150 batches
    method = EWC(samples=len(many), batch_size=batch_size)
    found = method.importance(made.model, made.run, many)
    for name, share in shares(wanted).items():
        assert shares(found)[name] == pytest.approx(share, rel=0.25, abs=0.003)
    far = sum(float((found[n] - wanted[n]).abs().sum()) for n in wanted) / sum(float(t.sum()) for t in wanted.values())
    fewer = EWC(samples=4 * batch_size, batch_size=batch_size).importance(made.model, made.run, many)
    farther = sum(float((fewer[n] - wanted[n]).abs().sum()) for n in wanted) / sum(
        float(t.sum()) for t in wanted.values()
    )
    assert far < 0.25
    assert far < 0.5 * farther, "more samples must bring it nearer"


@pytest.mark.parametrize("estimator", ["sampled", "rank1", "empirical", "exact"])
def test_it_knows_nothing_of_how_rows_are_batched_flattened_or_packed(estimator, tmp_path, model):
    """Drawn labels are compared at equal batches: other batches of the same draws only have the same expectation."""
    found = {}
    few = texts(2) if estimator == "exact" else texts(7)
    for layout, settings in LAYOUTS.items():
        made = trainer([EWC()], tmp_path / layout, copy.deepcopy(model).double(), **settings)
        for size in (1, 3):
            method = EWC(estimator=estimator, batch_size=size, top_k=2 if estimator == "exact" else None)
            found[layout, size] = method.importance(made.model, made.run, few)
    for (layout, size), importance in found.items():
        wanted = found["rows", size if estimator in ("sampled", "rank1") else 1]
        for name in wanted:
            torch.testing.assert_close(importance[name], wanted[name], rtol=1e-6, atol=1e-9, msg=f"{layout} {size}")


def test_with_lora_it_knows_nothing_of_how_rows_come(tmp_path, model):
    found = {}
    for layout, settings in LAYOUTS.items():
        made = trainer([LoRA(r=2), EWC()], tmp_path / layout, copy.deepcopy(model).double(), **settings)
        found[layout] = EWC(batch_size=3).importance(made.model, made.run, texts(7))
    for layout, importance in found.items():
        for name, wanted in found["rows"].items():
            torch.testing.assert_close(importance[name], wanted, rtol=1e-6, atol=1e-9, msg=f"{layout} {name}")


def test_sequences_that_a_collator_flattens_are_told_apart(tmp_path, model):
    """A collator of the user's own may flatten, which nothing can take back."""
    model = model.double()
    ids = [torch.randint(0, 80, (length,)) for length in (5, 8, 3)]
    flat = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat([torch.arange(len(i)) for i in ids])[None]}
    labels = flat["input_ids"].masked_fill(flat["position_ids"] == 0, -100)
    whole = Run(tmp_path, batches=lambda data, size: iter([(flat, labels)]))
    alone = Run(tmp_path, batches=lambda data, size: iter([({"input_ids": i[None]}, i[None]) for i in ids]))
    found, wanted = (EWC(estimator="empirical").importance(model, run, rows(3)) for run in (whole, alone))
    assert distance(found, wanted) < 1e-6 * max(float(t.max()) for t in wanted.values())


def test_samples_and_batches_do_what_they_say(tmp_path):
    made, few = trainer([EWC()], tmp_path), rows(2)
    first = EWC(samples=1, estimator="empirical").importance(made.model, made.run, few)
    alone = EWC(estimator="empirical").importance(made.model, made.run, few.select([0]))
    assert same_bits(first, alone)


def test_with_lora_it_has_the_row_and_column_sums_of_the_base(few, tmp_path, model):
    made = trainer([LoRA(r=2), EWC()], tmp_path, model.double())
    pairs = params.lora_pairs(made.model)
    bases = {name: pair.base for name, pair in pairs.items()}
    flags = {name: p.requires_grad for name, p in made.model.named_parameters()}
    many = concatenate_datasets([few] * 300)
    found = EWC(samples=len(many), batch_size=4).importance(made.model, made.run, many)
    assert {name: p.requires_grad for name, p in made.model.named_parameters()} == flags
    for base in bases.values():
        base.requires_grad_(True)
    wanted = enumerated(made, few, bases)
    for name in bases:
        rows_of, columns_of = (found[key] for key in product_keys(name))
        assert rows_of.shape == (pairs[name].B.shape[0],)
        assert columns_of.shape == (pairs[name].A.shape[1],)
        for sums, axis in ((rows_of, 1), (columns_of, 0)):
            truth = wanted[name].sum(axis)
            assert float((sums - truth).abs().sum()) < 0.25 * float(truth.sum())
    assert sum(float(found[product_keys(name)[0]].sum()) for name in bases) == pytest.approx(
        sum(base.numel() for base in bases.values()), rel=1e-5
    )


def test_transposed_layers_swap_rows_and_columns(few, tmp_path, tokenizer):
    from tiny import tiny_model

    made = trainer([LoRA(r=2, targets=["c_attn"]), EWC()], tmp_path, tiny_model(tokenizer, kind="gpt2"))
    found = EWC().importance(made.model, made.run, few)
    for name, pair in params.lora_pairs(made.model).items():
        rows_key, columns_key = product_keys(name)
        assert found[rows_key].shape == (pair.B.shape[0],) == (96,)
        assert found[columns_key].shape == (pair.A.shape[1],) == (32,)


def test_gradient_on_a_trained_model(tmp_path):
    made = train([EWC(strength=0.4)], tmp_path)
    method = made.stack.methods[0]
    saved = load_file(tmp_path / "ewc" / "01.safetensors")
    for p in params.trainable(made.model).values():
        p.grad = torch.zeros_like(p)
    method.edit_gradients(made.model, made.run)
    squares = 0.0
    for name, p in params.trainable(made.model).items():
        away = p.detach() - made.run.start[name]
        torch.testing.assert_close(p.grad, 0.4 * saved[name] * away)
        squares += float((saved[name] * away.square()).double().sum())
    assert squares > 0
    assert method.pull.value(0.4) == pytest.approx(0.2 * squares, rel=1e-4)


def test_importance_of_one_is_l2sp(tmp_path, monkeypatch):
    """Whole runs, not one gradient: the two methods are then the same."""
    held = stored(train([L2SP(strength=0.5)], tmp_path / "l2sp").model)

    def ones(self, model, run, data):
        return {name: torch.ones_like(p) for name, p in params.trainable(model).items()}

    monkeypatch.setattr(EWC, "importance", ones)
    found = stored(train([EWC(strength=0.5)], tmp_path / "ewc").model)
    assert distance(found, held) < 1e-6


def test_proximal_at_a_huge_strength_keeps_what_matters(tmp_path, model):
    start = stored(model)
    made = train([EWC(strength=1e12, form="proximal")], tmp_path, weight_decay=0.1)
    assert finite(made.model)
    importance = load_file(tmp_path / "ewc" / "01.safetensors")
    after = stored(made.model)
    kept = {name: importance[name] > 1e-6 for name in start}
    assert sum(int(k.sum()) for k in kept.values()) > 1000
    assert all(float((after[n] - start[n])[kept[n]].abs().max()) < 1e-5 for n in start if kept[n].any())
    free = [n for n in start if (~kept[n]).any()]
    assert any(float((after[n] - start[n])[~kept[n]].abs().max()) > 1e-4 for n in free)


def test_too_stiff_for_sgd_is_an_error_and_proximal_is_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.ewc\.strength: .*form: proximal") as caught:
        train([EWC(strength=1e5)], tmp_path, optim="sgd")
    assert "\n" not in str(caught.value)
    assert finite(train([EWC(strength=1e5, form="proximal")], tmp_path / "proximal", optim="sgd").model)


def test_with_lora_a_stronger_pull_leaves_a_smaller_product(tmp_path):
    def change(strength):
        made = train([LoRA(r=4), EWC(strength=strength, form="proximal")], tmp_path / str(strength), steps=8)
        return sum(
            float((pair.scaling * pair.B @ pair.A).detach().square().sum())
            for pair in params.lora_pairs(made.model).values()
        )

    assert change(20.0) < 0.8 * change(0.0)


def test_the_next_task_adds_the_importance_of_this_one(tmp_path):
    def run(index):
        return Run(
            tmp_path / str(index), task=f"task {index}", task_index=index, shared=tmp_path, new_rows=rows(16, index),
            say=lambda line: None,
        )  # fmt: skip

    first = train([EWC(estimator="empirical", samples=2)], tmp_path / "1", run=run(1))
    old = load_file(tmp_path / "ewc" / "01.safetensors")
    both = load_file(tmp_path / "ewc" / "02.safetensors")
    with params.evaluating(first.model):
        new = EWC(estimator="empirical", samples=2).importance(first.model, first.run, rows(16, 1))
    assert distance(both, {name: old[name] + new[name] for name in old}) < 1e-3
    first.release()
    second = trainer([EWC(estimator="empirical", samples=2)], tmp_path / "2", first.model, run=run(2))
    before = stored(first.model)
    second.train()
    method = second.stack.methods[0]
    assert same_bits(dict(zip(before, method.pull._anchors)), before), "the anchor is the latest start"
    assert same_bits(dict(zip(before, method.pull._importance)), both)


def test_frozen_weights_have_no_importance(tmp_path):
    made = trainer([EWC()], tmp_path)
    for name, p in made.model.named_parameters():
        p.requires_grad_("layers.1" in name)
    found = EWC().importance(made.model, made.run, rows(2))
    assert found
    assert all("layers.1" in name for name in found)


def test_settings_without_effect_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"estimator: 'exact' has no effect with LoRA"):
        train([LoRA(r=2), EWC(estimator="exact")], tmp_path)
    with pytest.raises(ConfigError, match="top_k"):
        EWC(top_k=0)


def test_replay_and_ewc_use_the_same_old_rows(tmp_path):
    made = train([EWC(estimator="empirical", samples=4), Replay(fraction=0.25)], tmp_path)
    alone = trainer([EWC()], tmp_path / "alone")
    with params.evaluating(alone.model):
        wanted = EWC(estimator="empirical", samples=4).importance(alone.model, alone.run, rows(12, 100))
    assert distance(load_file(tmp_path / "ewc" / "01.safetensors"), wanted) < 1e-3
    assert made.run.has_replay


def test_families_have_an_importance_for_every_weight_that_acts():
    """On each family the Fisher reaches every trained tensor."""
    from families import FAMILIES, token_batch

    for kind in FAMILIES:
        model = family_model(kind)
        ids = token_batch()
        run = Run(directory=None, batches=lambda data, size, ids=ids: iter([({"input_ids": ids}, ids)]))
        found = EWC().importance(model, run, rows(3))
        silent = [name for name, t in found.items() if not t.any() and "k_proj.bias" not in name]
        assert not silent, (kind, silent)


def test_a_run_without_a_trainer_says_what_to_use(tmp_path):
    with pytest.raises(ConfigError, match="Use `ContinualTrainer`"):
        Run(tmp_path).batches([], 1)
