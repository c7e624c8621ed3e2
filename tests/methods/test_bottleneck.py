"""Bottleneck adapters in training: what learns, with which other methods, and sequences of tasks in the pipeline."""

from types import SimpleNamespace

import pytest
import torch
from run_kit import settings
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, same_bits, stored, train, trainer
from transformers import AutoModelForCausalLM

from retain import Bottleneck, Distill, Freeze, LoRA, OLoRA, load_run
from retain.cli import export
from retain.config import parse
from retain.errors import ConfigError
from retain.methods.base import Stack
from retain.methods.context import Run
from retain.models import bottleneck, params
from retain.models.load import load_model
from retain.pipeline import run
from retain.training import guards
from retain.training.trainer import ContinualTrainer


def place(task=1):
    return Run(directory=None, task_index=task, say=lambda line: None)


def test_the_base_stays_bit_for_bit(tmp_path):
    model = tiny_model(tiny_tokenizer())
    before = stored(model)
    made = train([Bottleneck(attention=True)], tmp_path, model, weight_decay=0.1)
    moved = {name: p for name, p in bottleneck.weights(made.model).items() if p.any()}
    assert moved.keys() == bottleneck.weights(made.model).keys()  # all of them learned
    bottleneck.detach(made.model)
    assert same_bits(stored(made.model), before)


def test_drawn_from_the_seed_and_the_task():
    def down(task, seed=0):
        run_ = place(task)
        run_.seed = seed
        model = Bottleneck().prepare_model(tiny_model(tiny_tokenizer()), run_)
        return next(iter(bottleneck.weights(model).values()))

    assert torch.equal(down(1), down(1))
    assert not torch.equal(down(1), down(2))
    assert not torch.equal(down(1), down(1, seed=5))


def test_tasks_stack_or_share():
    for share, expected in ((False, 2), (True, 1)):
        model = tiny_model(tiny_tokenizer())
        for task in (1, 2):
            Bottleneck(share=share).prepare_model(model, place(task))
        assert bottleneck.count(model) == expected
        assert set(params.trainable(model)) == set(bottleneck.weights(model, expected - 1))


@pytest.mark.parametrize("first", [Bottleneck, LoRA])
def test_lora_learns_as_well_in_either_order(first, tmp_path):
    pair = [Bottleneck(), LoRA(r=2)]
    made = train(pair if first is Bottleneck else pair[::-1], tmp_path)
    learned = params.trainable(made.model)
    assert {n for n in learned if ".lora_" not in n} == set(bottleneck.weights(made.model))
    assert any(".lora_" in name for name in learned)
    assert all(bool(p.any()) for p in learned.values())


def test_in_the_second_task_of_a_sequence_with_lora_the_first_stays(tmp_path):
    model = tiny_model(tiny_tokenizer())
    methods = lambda: [OLoRA(), Bottleneck(), LoRA(r=2)]  # noqa: E731
    for task in (1, 2):
        context = Run(tmp_path / str(task), task_index=task, shared=tmp_path, say=lambda line: None)
        before = {name: p.clone() for name, p in bottleneck.weights(model).items()}
        made = train(methods(), tmp_path / str(task), model, run=context)
        made.release()
        model = made.model
    assert before
    assert all(torch.equal(bottleneck.weights(model)[name], value) for name, value in before.items())
    assert bottleneck.count(model) == 2


def test_freezing_the_bottom_freezes_its_adapters(tmp_path):
    made = train([Freeze(share=0.5), Bottleneck()], tmp_path)
    assert {name.split(".")[2] for name in params.trainable(made.model)} == {"1"}


def test_the_teacher_is_the_model_before_the_adapter(tmp_path):
    """Its divergence is 0 at the first step, when the adapter does nothing, and not afterwards."""
    made = train([Bottleneck(), Distill()], tmp_path, train_rows=None)
    seen = [entry["loss/distill"] for entry in made.state.log_history if "loss/distill" in entry]
    assert abs(seen[0]) < 1e-7
    assert min(seen[1:]) > 1e-6


def test_gradient_checkpointing_gives_the_same(tmp_path):
    for methods in ([Bottleneck(attention=True)], [Bottleneck(), LoRA(r=2)]):
        plain = stored(train(methods, tmp_path / "plain").model)
        saving = stored(train(methods, tmp_path / "saving", gradient_checkpointing=True).model)
        assert all(torch.allclose(plain[n], saving[n], atol=1e-5) for n in plain)


def test_a_checkpoint_under_lora_holds_the_adapters_too(tmp_path):
    """PEFT writes its own weights alone."""
    saving = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    team = lambda: [LoRA(r=2), Bottleneck()]  # noqa: E731
    straight = train(team(), tmp_path / "straight", **saving)
    with pytest.raises(Killed):
        train(team(), tmp_path / "killed", callbacks=[StopAt(5)], **saving)
    again = trainer(team(), tmp_path / "killed", **saving)
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), stored(straight.model))


def test_a_quantised_base_is_refused():
    model = tiny_model(tiny_tokenizer())
    model.is_quantized = True
    with pytest.raises(ConfigError, match="quantize: none"):
        Bottleneck().prepare_model(model, place())


def test_shards_are_refused():
    model = Bottleneck().prepare_model(tiny_model(tiny_tokenizer()), place())
    host = SimpleNamespace(model=model, args=None, is_deepspeed_enabled=False, is_fsdp_enabled=True)
    with pytest.raises(ConfigError, match="Use DDP"):
        guards.check_host(host, Stack([Bottleneck()]))


# -- the whole pipeline ------------------------------------------------------------------------------------
TEAMS = {
    "alone": [{"bottleneck": {}}],
    "with lora": [{"bottleneck": {"attention": True}}, {"lora": {"r": 2}}, "distill"],
    "shared": [{"bottleneck": {"share": True}}, {"lora": {"r": 2}}],
}


def values(shop, output, team):
    train_ = settings(shop, output)["train"] | {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    return parse(settings(shop, output, methods=TEAMS[team], train=train_))


@pytest.fixture(scope="module", params=TEAMS)
def finished(request, shop, tmp_path_factory):
    """(team, run directory, weights of the model in memory after each task, as it was probed)."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    held = []

    import retain.pipeline as pipeline

    probe = pipeline._Runner._probe

    def noted(self, stage, index):
        held.append(stored(self._model_of(index)))
        probe(self, stage, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline._Runner, "_probe", noted)
        run(values(shop, output, request.param), say=lambda line: None)
    return request.param, output, held


def test_two_tasks_through_the_pipeline(shop, finished):
    team, output, held = finished
    lora = team != "alone"
    for number, stage in enumerate(("01-count", "02-which"), 1):
        folder = output / "tasks" / stage
        wanted = {"bottleneck", "done.json"} | ({"adapter"} if lora else set())
        assert wanted <= {f.name for f in folder.iterdir()}
        assert not (folder / "model").exists()
        model, _ = load_run(output, stage)
        assert bottleneck.count(model) == (1 if team == "shared" else number)
        assert same_bits(stored(model), held[number])
    base = AutoModelForCausalLM.from_pretrained(shop / "model")
    bottleneck.detach(model)
    assert same_bits(stored(model), stored(base)) != lora
    first, second = held[1], held[2]
    kept = [name for name in first if ".bottleneck.0." in name]
    assert kept
    assert all(torch.equal(first[name], second[name]) for name in kept) == (team != "shared")


@pytest.mark.parametrize("call", [4, 8])  # in the first task, in the second
def test_killed_and_continued_ends_with_the_same_bits(shop, finished, tmp_path, monkeypatch, call):
    calls = []
    step = ContinualTrainer.training_step

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return step(*args, **kwargs)

    team, whole, _ = finished
    config = values(shop, tmp_path / "run", team)
    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "training_step", counted)
        with pytest.raises(Killed):
            run(config, say=lambda line: None)
    run(config, say=lambda line: None)
    one, other = (load_run(folder)[0] for folder in (whole, tmp_path / "run"))
    assert same_bits(stored(one), stored(other))
    place = "tasks/01-count/bottleneck/adapter.safetensors"
    assert same_bits(load_file(whole / place), load_file(tmp_path / "run" / place))


def test_export_writes_the_base_and_the_adapters_beside_it(finished, tmp_path, capsys):
    _, output, held = finished
    export.command(str(output), str(tmp_path / "out"), None)
    assert "cannot be merged" in capsys.readouterr().out
    model, _ = load_model(str(tmp_path / "out"))
    assert same_bits(stored(model), held[2])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(stored(plain), {n: p for n, p in held[2].items() if ".bottleneck." not in n})
