"""Block expansion: what learns, what stays, and sequences of tasks through the whole pipeline."""

import pytest
import torch
from families import FAMILIES, family_model, token_batch
from run_kit import settings
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, stored, train
from transformers import AutoModelForCausalLM

from retain import Blocks, Freeze, load_run
from retain.config import parse
from retain.errors import ConfigError
from retain.methods.context import Run
from retain.models import expansion, params, structure
from retain.pipeline import run
from retain.training.trainer import ContinualTrainer


def prepared(kind, **options):
    model = family_model(kind)
    return Blocks(**options).prepare_model(model, Run(directory=None, say=lambda line: None))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_reads_learns_from_the_second_step_on(kind):
    """At the first step what the block reads with has a gradient of exactly 0, afterwards not."""
    model = prepared(kind, every=4)
    (block,) = expansion.newest(model)
    assert {id(p) for p in params.trainable(model).values()} == {id(p) for p in block.parameters()}
    silent = {id(p) for m in structure.blocks(model)[-1].writers() for p in m.parameters()}
    assert len(silent) == (4 if kind in ("gpt2", "gpt_neox", "opt") else 2)  # with biases
    learning = {name: p for name, p in block.named_parameters() if p.requires_grad}
    # a bias of keys never has a gradient: it moves all scores alike
    reads = {n: p for n, p in learning.items() if id(p) not in silent and p.dim() > 1}
    assert len(reads) >= 2
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-3, weight_decay=0.1)
    ids = token_batch()
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, p in reads.items():
            assert bool(p.grad.any()) == (step == 1), (name, step)
        assert step == 1 or all(bool(p.grad.any()) for p in block.parameters() if id(p) in silent)
        optimizer.step()


def test_own_blocks_stay_bit_for_bit(tmp_path):
    model = tiny_model(tiny_tokenizer())
    before = stored(model)
    made = train([Blocks()], tmp_path, model, weight_decay=0.1)
    after = stored(made.model)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    new = {name for name in after if name not in before}  # on top
    assert new == {name.replace("layers.1.", "layers.2.") for name in before if "layers.1." in name}
    assert all(bool((after[n] != before[n.replace("layers.2.", "layers.1.")]).any()) for n in new)


def test_settings():
    assert expansion.marks(prepared("llama", every=2)) == [0, 0, 1, 0, 0, 1]
    assert expansion.marks(prepared("llama", every=100)) == [0, 0, 0, 0, 1]
    assert expansion.marks(prepared("llama", every=0, count=4)) == [0, 1] * 4
    with pytest.raises(ConfigError, match="Allowed: 1 to 4"):
        prepared("llama", count=5)
    assert not Blocks(every=0).active


def test_tasks_add_their_own_or_share_one():
    for share, expected in ((False, [0, 0, 1, 2, 0, 0, 1, 2]), (True, [0, 0, 1, 0, 0, 1])):
        model = family_model("llama")
        for task in (1, 2):
            method = Blocks(count=2, share=share)
            method.prepare_model(model, Run(directory=None, task_index=task, say=lambda line: None))
        assert expansion.marks(model) == expected
        learning = {i for i, layer in enumerate(params.decoder_layers(model)) if next(layer.parameters()).requires_grad}
        assert learning == {i for i, mark in enumerate(expected) if mark == max(expected)}


def test_adapters_and_quantised_weights_are_refused():
    from retain import LoRA

    place = Run(directory=None, say=lambda line: None)
    with pytest.raises(ConfigError, match="Merge the adapters"):
        Blocks().prepare_model(LoRA(r=2).prepare_model(family_model("llama"), place), place)


def test_freezing_the_bottom_leaves_the_upper_new_blocks(tmp_path):
    made = train([Blocks(count=2), Freeze(share=0.5)], tmp_path)
    assert expansion.marks(made.model) == [0, 1, 0, 1]
    assert {name.split(".")[2] for name in params.trainable(made.model)} == {"3"}


def test_gradient_checkpointing_gives_the_same(tmp_path):
    plain = stored(train([Blocks()], tmp_path / "plain").model)
    saving = stored(train([Blocks()], tmp_path / "saving", gradient_checkpointing=True).model)
    assert all(torch.allclose(plain[n], saving[n], atol=1e-5) for n in plain)


# -- the whole pipeline ------------------------------------------------------------------------------------
def values(shop, output, **options):
    train_ = settings(shop, output)["train"] | {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    return parse(settings(shop, output, methods=[{"blocks": {"count": 1} | options}, "replay"], train=train_))


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(values(shop, output), say=lambda line: None)
    return output


def test_two_tasks_through_the_pipeline(shop, finished):
    model, tokenizer = load_run(finished)
    assert expansion.marks(model) == [0, 0, 1, 2]
    first, _ = load_run(finished, "01-count")
    assert expansion.marks(first) == [0, 0, 1]
    own = AutoModelForCausalLM.from_pretrained(shop / "model")
    ids = torch.tensor([tokenizer("count 3")["input_ids"]])
    for name, p in own.named_parameters():
        assert torch.equal(model.get_parameter(name), p), name
    for name, p in first.named_parameters():
        assert torch.equal(model.get_parameter(name), p), name
    texts = [
        m.eval().generate(ids, do_sample=False, max_new_tokens=8, use_cache=cache)
        for m in (model, AutoModelForCausalLM.from_pretrained(finished / "tasks" / "02-which" / "model"))
        for cache in (True, False)
    ]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_shared_blocks_through_the_pipeline(shop, tmp_path):
    run(values(shop, tmp_path / "run", share=True), say=lambda line: None)
    first, second = (load_run(tmp_path / "run", stage)[0] for stage in ("01-count", "02-which"))
    assert expansion.marks(first) == expansion.marks(second) == [0, 0, 1]
    moved = {n for n, p in first.named_parameters() if not torch.equal(p, second.get_parameter(n))}
    assert moved
    assert all(name.startswith("model.layers.2.") for name in moved)


@pytest.mark.parametrize("call", [4, 8])  # in the first task, in the second
def test_killed_and_continued_ends_with_the_same_bits(shop, finished, tmp_path, monkeypatch, call):
    calls = []
    step = ContinualTrainer.training_step

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return step(*args, **kwargs)

    config = values(shop, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "training_step", counted)
        with pytest.raises(Killed):
            run(config, say=lambda line: None)
    run(config, say=lambda line: None)
    for stage in ("01-count", "02-which"):
        one, other = (load_file(place / "tasks" / stage / "model" / "model.safetensors")
                      for place in (finished, tmp_path / "run"))  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_learns_was_added_so_it_learns_at_the_rate_of_adapters(shop, tmp_path):
    from retain.pipeline import plan

    def rate(*methods):
        plain = settings(shop, tmp_path, methods=list(methods), train={"use_cpu": True})
        return plan(parse(plain)).train["learning_rate"]

    assert rate("blocks") == rate("bottleneck") == rate("lora") == 10 * rate("replay")
