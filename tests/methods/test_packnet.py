"""PackNet: what a task keeps stays bit for bit, and its model comes out of the last one as it was."""

import shutil
import sys

import pytest
import torch
from families import FAMILIES, family_model
from run_kit import response_rows, settings, workshop, write_lines
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, rows, same_bits, stored, train, trainer
from transformers import TrainerCallback

from retain import load_run
from retain.config import parse
from retain.errors import ConfigError, RunError
from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.freeze import Freeze
from retain.methods.interpolate import Interpolate
from retain.methods.lora import LoRA
from retain.methods.packnet import PackNet
from retain.models import ownership, params

HARD = {"weight_decay": 0.1, "lr_scheduler_type": "constant"}  # what moves weights whose gradient is zero


class Seen(Method):
    """Remembers the weights after every step."""

    name = "seen"
    off = {}

    @property
    def active(self):
        return True

    def on_task_start(self, model, run):
        self.steps = [stored(model)]

    def see_step(self, model, run):
        self.steps.append(stored(model))


class MatricesOnly(Method):
    """Plain training of what PackNet trains."""

    name = "matrices"
    off = {}

    @property
    def active(self):
        return True

    def prepare_model(self, model, run):
        for name, p in model.named_parameters():
            p.requires_grad_("layers." in name and "norm" not in name)
        return model


def task(folder, index, methods, model=None, said=None, **options):
    say = (said if said is not None else []).append
    run = Run(folder / str(index), task_index=index, shared=folder, say=say)
    options = {"steps": 5, "train_rows": rows(16, 50 * index)} | HARD | options
    made = train(methods, run.directory, model, run=run, **options)
    made.release()
    made.model.requires_grad_(True)
    return made


def owners(folder, index):
    return load_file(folder / "owners" / f"{index:02d}.safetensors")


def logits(model):
    ids = tiny_tokenizer()("Seven small ships", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(ids).logits.clone()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """(folder, base, [(weights, logits) after each of three tasks])."""
    folder, model = tmp_path_factory.mktemp("three"), tiny_model(tiny_tokenizer())
    base, found = stored(model), []
    for index in (1, 2, 3):
        model = task(folder, index, [PackNet(keep=0.4)], model).model
        found.append((stored(model), logits(model)))
    return folder, base, found


def test_what_a_task_owns_stays_bit_for_bit(three):
    folder, _, found = three
    for index in (1, 2):
        for later in range(index + 1, 4):
            for name, owner in owners(folder, later).items():
                mine = owners(folder, index)[name] > 0
                assert torch.equal(owner[mine], owners(folder, index)[name][mine]), "an owner stays"
                assert torch.equal(found[later - 1][0][name][mine], found[index - 1][0][name][mine])


def test_masks_are_disjoint_cover_and_have_their_sizes(three):
    folder, base, _ = three
    last = owners(folder, 3)
    inside = {name for name in base if "layers." in name and "norm" not in name}
    assert set(last) == inside
    for owner in last.values():
        assert owner.dtype == torch.uint8
        assert int(owner.max()) == 3
        masks = [owner == t for t in range(4)]
        assert bool((torch.stack(masks).sum(0) == 1).all())
        free = owner.numel()
        for t in (1, 2, 3):
            assert int(masks[t].sum()) <= int(0.4 * free)
            free -= int(masks[t].sum())
    whole = sum(o.numel() for o in last.values())
    shares = [sum(int((o == t).sum()) for o in last.values()) / whole for t in (1, 2, 3)]
    assert shares == pytest.approx([0.4, 0.24, 0.144], abs=0.01)


def test_the_rest_is_as_before_the_first_task(three):
    folder, base, found = three
    for index, (weights, _) in enumerate(found, 1):
        for name, before in base.items():
            owner = owners(folder, index).get(name, torch.zeros(before.shape))
            assert torch.equal(weights[name][owner == 0], before[owner == 0]), name
            assert name not in owners(folder, index) or not torch.equal(weights[name], before)


def test_each_task_comes_out_of_the_last_model_bit_for_bit(three):
    folder, base, found = three
    for index, (weights, outputs) in enumerate(found, 1):
        model, before = tiny_model(tiny_tokenizer()), tiny_model(tiny_tokenizer())
        model.load_state_dict(found[2][0])
        before.load_state_dict(base)
        ownership.select(model, before, folder, index, 3)
        assert same_bits(stored(model), weights)
        assert torch.equal(logits(model), outputs)
        assert torch.equal(logits(model), found[2][1]) == (index == 3)


def test_without_retraining_it_is_plain_training_and_then_the_largest_changes(tmp_path):
    """Against a selection by sorting in lists."""
    base = stored(tiny_model(tiny_tokenizer()))
    plain = stored(task(tmp_path / "plain", 1, [MatricesOnly()]).model)
    packed = stored(task(tmp_path / "packed", 1, [PackNet(keep=0.3, retrain=0)]).model)
    for name, before in base.items():
        start, end = before.reshape(-1).tolist(), plain[name].reshape(-1).tolist()
        places = [i for i in range(len(start)) if start[i] != end[i]]
        if "layers." in name and "norm" not in name:
            places = sorted(places, key=lambda i: -abs(end[i] - start[i]))[: int(0.3 * len(start))]
        expected = before.clone().reshape(-1)
        expected[places] = plain[name].reshape(-1)[places]
        assert torch.equal(packed[name].reshape(-1), expected), name


def test_all_kept_and_no_retraining_is_plain_training_bit_for_bit(tmp_path):
    plain = task(tmp_path / "plain", 1, [MatricesOnly()])
    kept = task(tmp_path / "kept", 1, [PackNet(keep=1, retrain=0)])
    assert same_bits(stored(kept.model), stored(plain.model))
    full = {name: torch.ones_like(owner) for name, owner in owners(tmp_path / "kept", 1).items()}
    ownership.keep(full, tmp_path / "kept", 1)  # what did not change was given back
    with pytest.raises(ConfigError, match=r"methods\.packnet\.keep: earlier tasks own every weight") as caught:
        task(tmp_path / "kept", 2, [PackNet(keep=1, retrain=0)], kept.model)
    assert "\n" not in str(caught.value)


def test_in_the_last_steps_only_what_is_kept_moves(tmp_path):
    first = task(tmp_path, 1, [PackNet(keep=0.5)])
    seen, said = Seen(), []
    task(tmp_path, 2, [PackNet(keep=0.5, retrain=0.4), seen], first.model, said, steps=10)
    names = owners(tmp_path, 2)
    changed = [
        {n: after[n] != before[n] for n in names} for before, after in zip(seen.steps, seen.steps[1:], strict=False)
    ]
    assert len(changed) == 10
    for step, moved in enumerate(changed, 1):
        for name, owner in names.items():
            assert not bool((moved[name] & (owner == 1)).any()), "owned by the first task"
            if step > 6:
                assert not bool((moved[name] & (owner != 2)).any()), "pruned"
        assert any(bool((moved[n] & (names[n] == 2)).any()) for n in names), "what is kept goes on learning"
        if step < 6:
            assert any(bool((moved[n] & (names[n] == 0)).any()) for n in names), "all free weights learn at first"
    counts = [sum(int((owner == t).sum()) for owner in names.values()) for t in (0, 1, 2)]
    assert said == [
        f"packnet: {counts[0] + counts[2]:,} of {sum(counts):,} weights of the layers are free; all others stay.",
        f"packnet: {counts[2]:,} of {counts[0] + counts[2]:,} free weights are kept at step 6; "
        "the last 4 steps train them alone.",
    ]


@pytest.mark.parametrize("killed", [3, 5, 7], ids=["before", "in the step of", "after"])
def test_killed_around_the_pruning_it_ends_with_the_same_bits(killed, tmp_path):
    """Ten steps, pruned at the sixth; the second task, so that there are owners before."""
    first = stored(task(tmp_path, 1, [PackNet()]).model)
    options = {"steps": 10, "save_strategy": "steps", "save_steps": 2, "train_rows": rows(16, 100)} | HARD

    def make(place, **more):
        model = tiny_model(tiny_tokenizer())
        model.load_state_dict(first)
        shared = tmp_path / place
        shutil.copytree(tmp_path / "owners", shared / "owners", dirs_exist_ok=True)
        run = Run(shared / "2", task_index=2, shared=shared, say=lambda line: None)
        return trainer([PackNet(retrain=0.4)], run.directory, model, run=run, **options, **more)

    straight = make("straight")
    straight.train()
    with pytest.raises(Killed):
        make("killed", callbacks=[StopAt(killed)]).train()
    again = make("killed")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10
    assert same_bits(stored(again.model), stored(straight.model))
    assert same_bits(owners(tmp_path / "killed", 2), owners(tmp_path / "straight", 2))


def test_a_training_that_stops_early_is_pruned_all_the_same(tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    made = task(tmp_path, 1, [PackNet(keep=0.2)], steps=10, callbacks=[Enough()])
    assert made.state.global_step == 1
    base = stored(tiny_model(tiny_tokenizer()))
    for name, owner in owners(tmp_path, 1).items():
        assert 0 < int((owner == 1).sum()) <= int(0.2 * owner.numel())
        assert torch.equal(stored(made.model)[name] != base[name], owner == 1)


@pytest.mark.parametrize("order", [1, -1])
def test_moved_back_by_interpolation_a_task_still_comes_out_as_it_was(order, tmp_path):
    model = tiny_model(tiny_tokenizer())
    base, found = stored(model), []
    for index in (1, 2):
        model = task(tmp_path, index, [PackNet(), Interpolate(strength=0.5)][::order], model).model
        found.append(stored(model))
    before = tiny_model(tiny_tokenizer())
    before.load_state_dict(base)
    ownership.select(model, before, tmp_path, 1, 2)
    assert same_bits(stored(model), found[0])


def test_what_another_method_freezes_in_one_task_keeps_its_owner(tmp_path):
    model = task(tmp_path, 1, [PackNet(keep=0.5)]).model
    task(tmp_path, 2, [PackNet(keep=0.5), Freeze(share=0.5)], model)
    first, second = owners(tmp_path, 1), owners(tmp_path, 2)
    assert second.keys() == first.keys()
    lower = {name for name in first if "layers.0." in name}
    assert lower
    assert all(torch.equal(first[name], second[name]) == (name in lower) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_matrices_of_layers_learn(family):
    model = PackNet().prepare_model(family_model(family), Run(directory=None))
    inside = {id(p) for block in params.decoder_layers(model) for p in block.parameters()}
    for name, p in model.named_parameters():
        assert p.requires_grad == (id(p) in inside and p.dim() > 1), name


def test_mistakes_are_one_line(tmp_path):
    class Thaw(MatricesOnly):
        def prepare_model(self, model, run):
            return model.requires_grad_(True)

    adapted = LoRA(r=2).prepare_model(tiny_model(tiny_tokenizer()), Run(directory=None))
    bare = tiny_model(tiny_tokenizer())
    for name, p in bare.named_parameters():
        p.requires_grad_("embed" in name)
    wrong = [
        (lambda: trainer([PackNet()], tmp_path, adapted), r"an adapter's change cannot be kept in part"),
        (lambda: trainer([PackNet()], tmp_path, bare), r"no matrix of a layer learns"),
        (lambda: task(tmp_path, 1, [PackNet(), Thaw()]), r"more learns than the matrices of layers"),
        (lambda: task(tmp_path, 2, [PackNet()]), r"01\.safetensors: task 1 left nothing here"),
        (lambda: task(tmp_path, 256, [PackNet()]), r"255 tasks at most"),
    ]
    for act, words in wrong:
        with pytest.raises((ConfigError, RunError), match=words) as caught:
            act()
        assert "\n" not in str(caught.value)


# -- through the pipeline ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, configuration values) of a run of three tasks."""
    from retain.pipeline import run

    shop = workshop(tmp_path_factory.mktemp("shop"))
    write_lines(shop / "more" / "train.jsonl", response_rows(20, 40))
    write_lines(shop / "more" / "test.jsonl", response_rows(4, 300))
    tasks = [str(shop / name) for name in ("count", "which", "more")]
    values = settings(shop, shop / "run", tasks=tasks, methods=[{"packnet": {"keep": 0.5}}, {"replay": {"rows": 8}}])
    run(parse(values), lambda line: None)
    return shop / "run", values


def test_load_run_takes_every_task_out_of_the_last_stage(finished, tmp_path):
    folder, _ = finished
    stages = {"count": "01-count", "which": "02-which", "more": "03-more"}
    as_they_were = {name: load_run(folder, stage)[0] for name, stage in stages.items()}
    alone = tmp_path / "run"
    shutil.copytree(folder, alone)
    for stage in ("01-count", "02-which"):
        shutil.rmtree(alone / "tasks" / stage / "model")
    for name, expected in as_they_were.items():
        model, _ = load_run(alone, task=name)
        assert same_bits(stored(model), stored(expected))
        assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(as_they_were["count"]), logits(as_they_were["more"]))
    earlier, _ = load_run(folder, "02-which", task="count")
    assert same_bits(stored(earlier), stored(as_they_were["count"]))


def test_export_of_a_task(finished, tmp_path, monkeypatch):
    from retain.cli import main
    from retain.models.load import load_model

    words = ["export", str(finished[0]), "--task", "which", "--to", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["retain", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert same_bits(stored(load_model(str(tmp_path / "model"))[0]), stored(load_run(finished[0], "02-which")[0]))


def test_tasks_that_cannot_be_taken_out_are_one_line(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "shared", ignore=shutil.ignore_patterns("owners"))
    for wrong, words in [
        ({"directory": folder, "task": "wich"}, r"no task 'wich' up to 03-more\. Tasks: count, which, more\."),
        ({"directory": folder, "stage": "01-count", "task": "more"}, r"no task 'more' up to 01-count\."),
        ({"directory": folder, "stage": "00-base", "task": "count"}, r"Tasks: none\."),
        ({"directory": tmp_path / "shared", "task": "count"}, r"its tasks share all weights"),
    ]:
        with pytest.raises(RunError, match=words) as caught:
            load_run(**wrong)
        assert "\n" not in str(caught.value)
