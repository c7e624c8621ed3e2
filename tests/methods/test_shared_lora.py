"""Shared LoRA: the same as two adapters side by side; the shared part has one rank over all tasks."""

import copy

import pytest
import torch
from families import family_model, take_steps, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, distance, merged, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError, RunError
from retain.methods.context import Run
from retain.methods.freeze import Freeze
from retain.methods.l2sp import L2SP
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.methods.shared_lora import SharedLoRA
from retain.models import params
from retain.models.load import settled

QUICK = {"steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
DOMAINS = {"one": {"r": 2, "targets": "qv"}, "two": {"r": 3}, "three": {"r": 1, "targets": ["down_proj"]}}


def spec(folder, name, index):
    return Run(folder / name, task=name, task_index=index, shared=folder, say=lambda line: None)


def team(**settings):
    return [LoRA(domains=DOMAINS), SharedLoRA(**({"r": 2, "targets": "attention"} | settings))]


def task(folder, name, index, methods, model=None, **settings):
    run = spec(folder, name, index)
    made = train(methods, run.directory, model, run=run, train_rows=rows(16, 50 * index), **(QUICK | settings))
    made.release()
    return made


def sequence(folder, **settings):
    """(the finished training, the weights after it) of each of three tasks."""
    found, model = [], None
    for index, name in enumerate(DOMAINS, 1):
        made = task(folder, name, index, team(**settings), model)
        pairs = {n: copy.deepcopy(pair) for n, pair in params.lora_pairs(made.model).items()}
        model = settled(made.model)
        found.append((made, pairs, stored(model)))
    return found


def test_it_is_two_adapters_that_are_active_at_once():
    """Against PEFT itself: the same outputs and, factor by factor, the same gradients."""
    model = family_model("llama").double()
    method, run = SharedLoRA(r=2, targets="attention"), Run(directory=None, task="one", say=lambda line: None)
    joint = method.prepare_model(LoRA(domains=DOMAINS).prepare_model(copy.deepcopy(model), run), run).double()
    take_steps(joint)
    two = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), "task")
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    two.add_adapter("shared", LoraConfig(r=2, lora_alpha=4, target_modules=names))
    two.base_model.set_adapter(["task", "shared"])
    two.double()
    pairs, ids, gradients = params.lora_pairs(joint), token_batch(), []
    assert {n.rsplit(".", 1)[1]: len(p.A) for n, p in pairs.items()} == dict(zip(names, (4, 2, 4, 2)))
    for name, pair in pairs.items():
        layer = params.causal(two).get_submodule(name)
        own = 2 if "task" in layer.lora_A else 0
        for part, rank in (("task", slice(0, own)), ("shared", slice(own, None))):
            if part in layer.lora_A:
                layer.lora_A[part].weight.data = pair.A.detach()[rank].clone()
                layer.lora_B[part].weight.data = pair.B.detach()[:, rank].clone()
    for wrapped in (joint, two):
        wrapped.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(joint(ids).logits, two(ids).logits)
    for name, pair in pairs.items():
        layer = params.causal(two).get_submodule(name)
        parts = [part for part in ("task", "shared") if part in layer.lora_A]
        gradients.append(pair.A.grad.abs().max())
        torch.testing.assert_close(pair.A.grad, torch.cat([layer.lora_A[part].weight.grad for part in parts]))
        torch.testing.assert_close(pair.B.grad, torch.cat([layer.lora_B[part].weight.grad for part in parts], 1))
    assert min(gradients) > 0


def test_over_all_tasks_the_shared_part_is_one_product(tmp_path):
    """What three tasks did is the three parts of their own, and one product of rank 2: the last shared factors."""
    base = stored(tiny_model(tiny_tokenizer()))
    found = sequence(tmp_path)
    _, _, last = found[-1]
    own_rank = {"one": 2, "two": 3, "three": 1}
    attention = 0
    for name in {n.removesuffix(".weight") for n in base if "_proj" in n}:
        leaf, s = name.rsplit(".", 1)[1], 2.0
        change = last[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        for index, (key, (_, pairs, _)) in enumerate(zip(DOMAINS, found), 1):
            here = {"one": leaf in ("q_proj", "v_proj"), "two": True, "three": leaf == "down_proj"}[key]
            own, shared = own_rank[key] * here, 2 * (leaf in ("q_proj", "k_proj", "v_proj", "o_proj"))
            assert (name in pairs) == bool(own or shared)
            if name in pairs:
                pair = pairs[name]
                assert len(pair.A) == own + shared * (1 if index == 1 else 2)
                assert pair.scaling == s
                change -= s * (pair.B[:, :own].double() @ pair.A[:own].double())
        if shared:
            attention += 1
            pair = found[-1][1][name]
            wanted = s * pair.B[:, own : own + 2].double() @ pair.A[own : own + 2].double()
            torch.testing.assert_close(change, wanted, atol=1e-6, rtol=1e-4)
            assert wanted.abs().max() > 1e-4
        else:
            assert change.abs().max() < 1e-6
    assert attention == 8


def test_every_task_begins_at_the_model_that_was_kept_and_where_the_shared_part_was(tmp_path):
    first = task(tmp_path, "one", 1, team())
    left = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in params.lora_pairs(first.model).items()}
    base = settled(first.model)
    kept = stored(base)
    run = spec(tmp_path, "two", 2)
    made = trainer(team(), tmp_path / "two", base, run=run)
    made.stack.on_model_ready(made.model, made.run)
    assert distance(merged(made.model), kept) < 1e-6
    for name, pair in params.lora_pairs(made.model).items():
        assert not pair.B[:, :3].any()
        if name in left and "down" not in name:
            own = 2 if "q_proj" in name or "v_proj" in name else 0
            assert torch.equal(pair.A[3:5], left[name][0][own:])
            assert torch.equal(pair.B[:, 3:5], left[name][1][:, own:])
            assert torch.equal(pair.B[:, 5:], -pair.B[:, 3:5])


def test_what_is_taken_out_stays_bit_for_bit(tmp_path):
    (_, first, _), (_, second, _), _ = sequence(tmp_path)
    wide = [name for name, pair in second.items() if len(pair.A) == 3 + 4]
    assert len(wide) == 8
    for name in wide:
        own = 2 if "q_proj" in name or "v_proj" in name else 0
        assert torch.equal(second[name].A[5:], first[name].A[own:])
        assert torch.equal(second[name].B[:, 5:], -first[name].B[:, own:])
        assert not torch.equal(second[name].A[3:5], first[name].A[own:])


def test_learned_in_the_first_task_alone(tmp_path):
    found = sequence(tmp_path, learns="first")
    assert {len(pair.A) for pair in found[1][1].values()} == {3}
    plain = task(tmp_path, "two", 2, [LoRA(domains=DOMAINS)], _with(found[0][2]))
    assert same_bits(stored(settled(plain.model)), found[1][2])


def _with(weights):
    model = tiny_model(tiny_tokenizer())
    model.load_state_dict(weights, strict=False)
    return model


def test_the_kept_adapter_gives_the_same_model_and_frozen_layers_stay(tmp_path):
    first = task(tmp_path, "one", 1, [Freeze(share=0.5), *team()])
    base = stored(settled(first.model))
    second = task(tmp_path, "two", 2, [Freeze(share=0.5), *team()], _with(base))
    second.model.save_pretrained(tmp_path / "adapter")
    loaded = settled(PeftModel.from_pretrained(_with(base), str(tmp_path / "adapter"), is_trainable=True))
    assert same_bits(stored(loaded), merged(second.model))
    assert {n for n in base if not torch.equal(base[n], stored(loaded)[n])} <= {n for n in base if "layers.1." in n}
    assert any(len(pair.A) == 7 for pair in params.lora_pairs(second.model).values())


def test_a_resumed_later_task_ends_with_the_same_bits(tmp_path):
    base, ends = stored(settled(task(tmp_path, "one", 1, team()).model)), []
    settings = QUICK | {"steps": 4, "save_strategy": "steps", "save_steps": 2, "train_rows": rows(16, 100)}
    for killed in (None, 3):
        folder = tmp_path / f"second{killed}"
        if killed:
            with pytest.raises(Killed):
                train(team(), folder, _with(base), run=spec(tmp_path, "two", 2), callbacks=[StopAt(3)], **settings)
        made = trainer(team(), folder, _with(base), run=spec(tmp_path, "two", 2), **settings)
        made.train(resume_from_checkpoint=killed is not None)
        ends.append(stored(made.model))
    assert same_bits(*ends)


def test_a_pull_sees_both_parts(tmp_path):
    """The term of L2-SP is the squared change of the weights as they act, of both parts together."""
    base = stored(settled(task(tmp_path, "one", 1, team()).model))
    ends, terms = [], []
    for strength in (1e-6, 30.0):
        made = task(tmp_path, "two", 2, [*team(), L2SP(strength=strength), Replay(fraction=0.5)], _with(base), steps=4)
        ends.append(stored(settled(made.model)))
        terms += [e["loss/l2sp"] for e in made.state.log_history if "loss/l2sp" in e][-1:]
    far, near = (sum(float((end[n] - base[n]).square().sum()) for n in base) for end in ends)
    assert 0 < near < far
    assert min(terms) > 0


def test_it_may_stand_before_lora(tmp_path):
    one, other = (
        task(tmp_path / str(i), "one", 1, methods, steps=2)
        for i, methods in enumerate(([LoRA(r=4), SharedLoRA(r=2)], [SharedLoRA(r=2), LoRA(r=4)]))
    )
    assert same_bits(stored(one.model), stored(other.model))


def test_mistakes_are_one_line(model, tmp_path):
    cases = [
        ([LoRA(dora=True), SharedLoRA()], "needs plain factors"),
        ([LoRA(kind="ia3"), SharedLoRA()], "needs plain factors"),
    ]
    for methods, words in cases:
        with pytest.raises(ConfigError, match=rf"methods\.shared_lora: .*{words}") as caught:
            task(tmp_path, "one", 1, methods)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=r"01\.safetensors: task 1 left nothing here"):
        task(tmp_path / "none", "two", 2, team())
    task(tmp_path, "one", 1, team(), steps=1)
    with pytest.raises(ConfigError, match=r"methods\.shared_lora: .* had another rank or size in the task before"):
        task(tmp_path, "two", 2, team(r=4))
    model.is_quantized = True
    with pytest.raises(ConfigError, match=r"methods\.shared_lora: .*a quantised base"):
        trainer([SharedLoRA()], tmp_path, model)
