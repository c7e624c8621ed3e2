"""Quantised bases (QLoRA): loaded, trained with methods, saved and opened again, on any processor."""

import pytest
import torch
from run_kit import settings, workshop
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, distance, finite, rows, same_bits, stored, train, trainer

from retain import load_run
from retain.config import ModelConfig, parse
from retain.errors import ModelError
from retain.methods.context import Run
from retain.methods.distill import Distill
from retain.methods.ewc import EWC
from retain.methods.interpolate import Interpolate
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.base_gradients import base_gradients
from retain.models.load import load_model, load_stage
from retain.models.pull import product_keys
from retain.pipeline import _Runner, run
from retain.training.trainer import ContinualTrainer

pytest.importorskip("bitsandbytes")

KINDS = ["4bit", "8bit"]
HELD = {"4bit": torch.uint8, "8bit": torch.int8}
ROUNDING = {"4bit": 0.15, "8bit": 0.02}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = workshop(tmp_path_factory.mktemp("shop"))
    calm = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # rounding must not be blown up
    tiny_model(tiny_tokenizer(), **calm).save_pretrained(folder / "model")
    return folder


def configured(shop, kind):
    return ModelConfig(name=str(shop / "model"), quantize=kind)


def quantised(shop, kind):
    return load_model(configured(shop, kind), tokenizer=False)[0]


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None] if ids is None else ids).logits


def far(one, other):
    """Relative distance of two tensors."""
    return float((one - other).norm() / other.norm())


def base_bits(model):
    return {name.replace(".base_layer", ""): t for name, t in stored(model).items() if "lora_" not in name}


def finite_factors(model):
    return finite(torch.nn.ParameterList(params.trainable(model).values()))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_held_in_few_bits_and_act_as_they_say(shop, kind):
    model, plain = quantised(shop, kind), load_model(str(shop / "model"))[0]
    as_ordinary = load_stage(configured(shop, kind), [], merged=True)
    for name, wanted in stored(plain).items():
        held, acts = model.get_parameter(name), as_ordinary.get_parameter(name)
        assert acts.dtype == torch.float32
        if "_proj" not in name:
            assert torch.equal(held, wanted), name
            assert torch.equal(acts, wanted), name
            continue
        assert held.dtype == HELD[kind]
        assert held.numel() == wanted.numel() // (2 if kind == "4bit" else 1)
        assert 1e-3 < far(acts, wanted) < ROUNDING[kind], name
    assert far(logits(model), logits(as_ordinary)) < 0.05


def test_widths_that_would_be_read_wrongly_are_refused(tiny_folder):
    with pytest.raises(ModelError, match=r"multiples of 64; model\.layers\.0\.\S+ has 32") as caught:
        load_model(ModelConfig(name=str(tiny_folder), quantize="4bit"))
    assert "\n" not in str(caught.value)
    assert load_model(ModelConfig(name=str(tiny_folder), quantize="8bit"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_base_also_after_an_evaluation(shop, kind):
    model = quantised(shop, kind)
    ids = torch.arange(3, 40)[None]

    def slope(model):
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        return torch.autograd.grad(model.train()(ids, labels=ids).loss, weight)[0]

    before = slope(model)
    logits(model)
    assert torch.equal(slope(model), before)
    wanted = slope(load_stage(configured(shop, kind), [], merged=True))
    assert far(before, wanted) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_methods_then_saved_and_opened_again(shop, tmp_path, kind):
    from retain.probes.asking import ask
    from retain.probes.base import Subject
    from retain.probes.suite import load_probes

    model = quantised(shop, kind)
    before = base_bits(model)
    methods = [LoRA(r=4), Distill(strength=0.5), EWC(strength=0.5), Interpolate(strength=0.25)]
    made = train(methods, tmp_path, model, steps=2, learning_rate=1e-2)
    assert finite_factors(made.model)
    assert same_bits(base_bits(made.model), before), "the base is as it was"
    pairs = params.lora_pairs(made.model)
    assert len(pairs) == 2 * 7
    assert all(bool(pair.B.any()) for pair in pairs.values())
    assert {p.dtype for p in params.trainable(made.model).values()} == {torch.float32}
    assert methods[2].pull.value(1.0) > 0
    made.release()
    folder = tmp_path / "01"
    made.model.save_pretrained(folder / "adapter")
    again = load_stage(configured(shop, kind), [folder])
    assert same_bits(base_bits(again), before)
    assert torch.equal(logits(again), logits(made.model))
    assert far(logits(again), logits(quantised(shop, kind))) > 1e-3
    assert set(params.trainable(again)) == set(params.trainable(made.model)), "it can go on learning"
    probes = load_probes(str(shop / "probes.jsonl"))
    found = [ask(probes, Subject(m, tiny_tokenizer())) for m in (again, made.model)]
    assert found[0] == found[1]
    assert {row["probe"] for row in found[0]} == {"animals", "prose"}


@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_is_of_the_product(shop, tmp_path, kind):
    full = train([LoRA(r=4)], tmp_path / "full", quantised(shop, kind), steps=2)
    part = train([LoRA(r=4), Interpolate(strength=0.25)], tmp_path / "part", quantised(shop, kind), steps=2)
    wanted = {n: pair.B.detach() * 0.75 for n, pair in params.lora_pairs(full.model).items()}
    assert distance({n: pair.B.detach() for n, pair in params.lora_pairs(part.model).items()}, wanted) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_differentiated_as_if_its_weights_were_ordinary(shop, tmp_path, kind):
    ids = torch.arange(3, 40)[None]
    found = []
    for model in (quantised(shop, kind), load_stage(configured(shop, kind), [], merged=True)):
        model = LoRA(r=2).prepare_model(model, Run(tmp_path)).eval()
        with base_gradients(model) as (bases, gradients):
            scalar = model(ids).logits.log_softmax(-1)[..., 7].sum()
            found.append(dict(zip(bases, gradients(scalar, list(bases.values()), False))))
    held, ordinary = found
    assert held.keys() == ordinary.keys()
    assert len(held) == 2 * 7
    for name, gradient in held.items():
        assert gradient.shape == ordinary[name].shape
        assert far(gradient, ordinary[name]) < 0.1, name


@pytest.mark.parametrize("kind", KINDS)
def test_importance_has_mean_one_and_reaches_every_layer(shop, tmp_path, kind):
    made = trainer([LoRA(r=2), EWC()], tmp_path, quantised(shop, kind))
    with params.evaluating(made.model):
        found = EWC(samples=8).importance(made.model, made.run, rows(8))
    pairs = params.lora_pairs(made.model)
    keys = {name: product_keys(name) for name in pairs}
    for name, (row_key, column_key) in keys.items():
        assert found[row_key].shape == (pairs[name].B.shape[0],)
        assert found[column_key].shape == (pairs[name].A.shape[1],)
        assert float(found[row_key].sum()) == pytest.approx(float(found[column_key].sum()), rel=1e-4)
        assert bool((found[row_key] > 0).any()), name
    whole = sum(float(found[row_key].sum()) for row_key, _ in keys.values())
    assert whole == pytest.approx(sum(p.B.shape[0] * p.A.shape[1] for p in pairs.values()), rel=1e-4)


def short(shop, output, kind):
    methods = [{"lora": {"r": 4}}, {"replay": {"fraction": 0.25}}, "distill", {"ewc": {"samples": 4}}]
    values = settings(shop, output, model={"name": str(shop / "model"), "quantize": kind}, methods=methods)
    values["train"] |= {"max_steps": 3, "learning_rate": 1e-2, "save_steps": 1}
    return parse(values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_tasks_is_opened_as_it_was_probed(shop, tmp_path, monkeypatch, kind):
    kept = {}
    probe = _Runner._probe

    def spy(self, stage, index):
        probe(self, stage, index)
        kept[stage] = logits(self._model_of(index))

    monkeypatch.setattr(_Runner, "_probe", spy)
    config = short(shop, tmp_path / "run", kind)
    results = run(config, lambda line: None)
    assert [s.steps for s in results.training] == [3, 3]
    assert {c.probe for c in results.changes} == {"animals", "prose", "count", "which"}
    tasks = [tmp_path / "run" / "tasks" / stage for stage in results.stages[1:]]
    for i, stage in enumerate(results.stages):
        model = load_stage(config.model, tasks[:i])
        assert torch.equal(logits(model), kept[stage]), stage
        ordinary, _ = load_run(tmp_path / "run", stage)
        assert not hasattr(ordinary, "peft_config")
        assert all(p.is_floating_point() for p in ordinary.parameters())
        assert far(logits(ordinary), kept[stage]) < 0.03, stage
    assert far(kept["02-which"], kept["01-count"]) > 0.05
    ordinary.save_pretrained(tmp_path / "exported")
    assert torch.equal(logits(load_model(str(tmp_path / "exported"), tokenizer=False)[0]), logits(ordinary))


def test_a_run_that_was_killed_ends_with_the_same_bits(shop, tmp_path, monkeypatch):
    whole, broken = (short(shop, tmp_path / name, "4bit") for name in ("whole", "broken"))
    run(whole, lambda line: None)
    step, count = ContinualTrainer.training_step, [0]

    def killed(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 6:  # the last step of the second task
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "training_step", killed)
        with pytest.raises(Killed):
            run(broken, lambda line: None)
    said = []
    run(broken, said.append)
    assert "which: going on from checkpoint-2." in said
    for stage in ("01-count", "02-which"):
        name = f"tasks/{stage}/adapter/adapter_model.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), stage


def test_an_adapter_is_not_merged_into_a_quantised_base(shop, tmp_path):
    made = LoRA(r=2).prepare_model(quantised(shop, "4bit"), Run(tmp_path))
    made.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter") as caught:
        load_model(ModelConfig(name=str(tmp_path / "adapter"), quantize="4bit"), tokenizer=False)
    assert "\n" not in str(caught.value)
