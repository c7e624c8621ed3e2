"""Gradual unfreezing: what is closed keeps its bits, rates are what they say, and a resumed run opens on time."""

import itertools

import pytest
import torch
from families import FAMILIES, family_model, names_below
from training_kit import Killed, StopAt, distance, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods.freeze import Freeze
from retain.methods.lora import LoRA
from retain.methods.unfreeze import Unfreeze
from retain.models import params

#: Weight decay moves every weight that the optimizer touches.
DECAYING = {"weight_decay": 0.1, "lr_scheduler_type": "constant"}
TWO = [{"top": 1}, {"begin": 0.5, "rate": 0.1}]


def opened(model, **settings):
    return [(begin, set(rates)) for begin, rates in Unfreeze(**settings).stages(model)]


def said(method, folder, **settings):
    made, lines = trainer([method], folder, **settings), []
    made.run.say = lines.append
    made.train()
    return lines


def moved(start, end):
    return {name for name in start if not torch.equal(start[name], end[name])}


@pytest.mark.parametrize("kind", [*FAMILIES, "bloom"])
def test_groups_go_from_the_head_to_the_embeddings(kind):
    model = family_model(kind)
    names = {id(p): name for name, p in model.named_parameters()}
    stages = opened(model, groups=4, every=0.2)
    assert [begin for begin, _ in stages] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(stages))
    assert stages[-1][1] == set(names.values())
    embeddings = names_below(model)
    top = {names[id(p)] for p in params.decoder_layers(model)[-1].parameters()}
    assert top <= stages[0][1]
    head = {names[id(p)] for p in model.get_output_embeddings().parameters()}
    for _, names_open in stages[:-1]:
        assert not embeddings & names_open
        assert head <= names_open or head <= embeddings
    for i, (_, names_open) in enumerate(stages):
        layers = [{names[id(p)] for p in layer.parameters()} <= names_open for layer in params.decoder_layers(model)]
        assert layers == [False] * (3 - i) + [True] * (i + 1)


def test_groups_are_even_and_no_more_than_layers():
    model = family_model("llama")
    assert [len(names) for _, names in opened(model, groups=2)] == [2 * 9 + 2, 4 * 9 + 3]
    assert opened(model, groups=9) == opened(model, groups=4)
    assert len(opened(model, groups=4, every=0)) == 1


def test_rates_fall_from_group_to_group():
    model = family_model("llama")
    method = Unfreeze(groups=4, decay=2.0)
    method.on_task_start(model, None)
    rates = method.learning_rates(model, None)
    assert rates["model.layers.2.mlp.up_proj.weight"] == 0.5
    assert rates["model.layers.0.mlp.up_proj.weight"] == rates["model.embed_tokens.weight"] == 0.125
    assert not {name for name in rates if "layers.3" in name or "lm_head" in name}, "the top learns at the full rate"


def test_closed_weights_keep_every_bit_and_open_when_it_is_time(tmp_path, model):
    start = stored(model)
    method = Unfreeze(stages=[{"top": 0}, {"begin": 0.25, "top": 1}, {"begin": 0.5}])
    halves = {}

    class Looking(Unfreeze):
        name = "looking"

        def on_step_end(self, model, run):
            halves[run.step] = stored(model)

    train([method, Looking(groups=2)], tmp_path, model, steps=8, **DECAYING)
    head = {"lm_head.weight", "model.norm.weight"}
    top = {name for name in start if "layers.1." in name}
    assert [moved(start, halves[i]) for i in (0, 1)] == [head] * 2
    assert [moved(start, halves[i]) for i in (2, 3)] == [head | top] * 2
    assert [moved(start, halves[i]) for i in (4, 7)] == [set(start)] * 2


def test_closed_weights_have_no_moments(tmp_path):
    made = train([Unfreeze(stages=[{"top": 1}, {"begin": 0.5}])], tmp_path, **DECAYING)
    steps = {name: int(made.run.moments(p)["step"]) for name, p in params.trainable(made.model).items()}
    assert {steps[name] for name in steps if "layers.1." in name} == {4}
    assert {steps[name] for name in steps if "layers.0." in name or "embed" in name} == {2}


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_rate_of_a_stage_is_that_learning_rate(optim, tmp_path):
    """Two stages at η and η/10 are plain training at η, then at η/10 with the same moments."""
    settings = {"steps": 4, "optim": optim, "max_grad_norm": 0.0, **DECAYING}

    class Slower(Unfreeze):
        """The same by another way: the optimizer's own rates."""

        name = "slower"

        def edit_gradients(self, model, run):
            for group in run.groups():
                group["lr"] = 1e-2 * (0.1 if run.step >= 2 else 1.0)

    other = trainer([Slower(groups=2, decay=1.0)], tmp_path / "wanted", **settings)
    other.run.groups = lambda: other.optimizer.param_groups
    other.train()
    plain = stored(train([], tmp_path / "plain", **settings).model)
    stages = [{}, {"begin": 0.5, "rate": 0.1}]
    made = stored(train([Unfreeze(stages=stages)], tmp_path / "made", **settings).model)
    assert distance(made, stored(other.model)) < 1e-6
    assert distance(made, plain) > 1e-4


def test_what_opens_later_warms_up(tmp_path, model):
    """At a rate that rises from 1/3 over two steps, the first step of a layer is a third of what it would be."""
    start, ends = stored(model), {}
    for warmup in (0, 2):
        method = Unfreeze(stages=[{"top": 1}, {"begin": 0.5}], warmup=warmup)
        made = train([method], tmp_path / str(warmup), steps=2, max_grad_norm=0.0, **DECAYING)
        ends[warmup] = stored(made.model)
    for name in start:
        step, full = ends[2][name] - start[name], ends[0][name] - start[name]
        share = 1 / 3 if "layers.0." in name or "embed" in name else 1.0
        torch.testing.assert_close(step, share * full, atol=1e-6, rtol=1e-5)


def test_all_open_at_once_at_one_rate_is_plain_training(tmp_path):
    plain = stored(train([], tmp_path / "plain").model)
    for i, settings in enumerate(({"groups": 2, "every": 0, "decay": 1}, {"stages": [{}]})):
        made = train([Unfreeze(**settings)], tmp_path / str(i))
        assert made.stack.methods
        assert same_bits(stored(made.model), plain)


@pytest.mark.parametrize("killed", [3, 5])  # before and after the second stage began
def test_a_resumed_run_opens_at_the_stated_step(killed, tmp_path):
    settings = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    method = {"stages": [{"top": 1}, {"begin": 0.5, "rate": 0.3}], "warmup": 2}
    straight = stored(train([Unfreeze(**method)], tmp_path / "straight", **settings).model)
    with pytest.raises(Killed):
        train([Unfreeze(**method)], tmp_path / "killed", callbacks=[StopAt(killed)], **settings)
    again = trainer([Unfreeze(**method)], tmp_path / "killed", **settings)
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), straight)


def test_adapters_open_with_their_layers(tmp_path):
    made = train([LoRA(r=2), Unfreeze(stages=[{"top": 1}])], tmp_path, **DECAYING)
    pairs = params.lora_pairs(made.model)
    assert {name.split(".")[2] for name, pair in pairs.items() if pair.B.any()} == {"1"}
    assert {name.split(".")[2] for name in pairs} == {"0", "1"}


def test_frozen_layers_make_no_group(tmp_path):
    lines = said(Unfreeze(groups=2), tmp_path / "all")
    assert len(lines) == 2
    made = train([Freeze(share=0.5), Unfreeze(groups=2)], tmp_path)
    assert len(made.stack.methods[1].stages(made.model)) == 1


def test_each_stage_says_what_is_trainable(tmp_path, model):
    lines = said(Unfreeze(stages=TWO), tmp_path)
    outer = ("layers.1", "lm_head", "model.norm")
    top = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in outer))
    total = sum(p.numel() for p in model.parameters())
    assert lines == [
        f"unfreeze: steps 1–2: {top:,} of {total:,} trainable parameters, learning rate × 1.",
        f"unfreeze: steps 3–4: {total:,} of {total:,} trainable parameters, learning rate × 0.1.",
    ]
    short = said(Unfreeze(stages=[{"top": 1}, {"begin": 0.3, "top": 2}, {"begin": 0.4}]), tmp_path / "short")
    assert short[1] == "unfreeze: stage 2 has no step of its own; the run is too short for it."


def test_a_stage_that_never_begins_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"stage 2 would begin at step 4 of 4, so never") as caught:
        train([Unfreeze(stages=[{"top": 1}, {"begin": 0.9}])], tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="so never"):
        train([Unfreeze(groups=2, every=0.99)], tmp_path / "groups")


def test_stages_that_open_nothing_or_go_backwards_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.unfreeze: the first stage opens nothing trainable"):
        train([LoRA(r=2), Unfreeze(stages=[{"top": 0}, {"begin": 0.5}])], tmp_path)
    for begins in ([0.1], [0, 0.5, 0.5], [0, 0.6, 0.3]):
        with pytest.raises(ConfigError, match=r"methods\.unfreeze\.stages: .*the first stage begins at 0"):
            Unfreeze(stages=[{"begin": begin} for begin in begins])


def test_a_stage_may_give_its_learning_rate_itself(tmp_path):
    """The last layer and the head first, then everything at 5e-4, is the stage with the factor 0.05; it says so."""
    ends = []
    for name, second in (("rate", {"rate": 0.05}), ("own", {"learning_rate": 5e-4})):
        made = train([Unfreeze(stages=[{"top": 1}, {"begin": 0.5, **second}])], tmp_path / name, **DECAYING)
        ends.append(stored(made.model))
    assert distance(*ends) < 1e-7
    lines = said(Unfreeze(stages=[{"top": 1}, {"begin": 0.5, "learning_rate": 5e-4}]), tmp_path / "said")
    assert lines[0].endswith("learning rate × 1.")
    assert lines[1].endswith("learning rate × 0.05 (0.0005).")


def test_a_rate_and_a_learning_rate_are_one_too_many():
    with pytest.raises(ConfigError, match="`learning_rate` the rate itself; set one") as caught:
        Unfreeze(stages=[{"rate": 0.1, "learning_rate": 5e-6}])
    assert "\n" not in str(caught.value)


def test_other_methods_and_the_log_see_the_rate_itself(tmp_path):
    """Whatever group of parameters comes first, at whatever factor."""
    made = train([Unfreeze(groups=2, decay=2.6, every=0.0)], tmp_path, steps=2, lr_scheduler_type="constant")
    assert made.run.learning_rate == pytest.approx(1e-2)
    logged = [line["learning_rate"] for line in made.state.log_history if "learning_rate" in line]
    assert logged == pytest.approx([1e-2] * 2)
