"""SI: what a weight earned of the drop in loss, by the task's own gradient and the move that was really made."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, distance, finite, merged, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.functional import path_integral
from retain.methods.context import Run, answer_loss
from retain.methods.l2sp import L2SP
from retain.methods.lora import LoRA
from retain.methods.si import SI
from retain.models import params
from retain.models.load import settled
from retain.models.pull import product_keys

PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def in_sequence(folder, index, **changes):
    options = {"task": f"task {index}", "task_index": index, "shared": folder, "say": lambda line: None}
    return Run(folder / str(index), **(options | changes))


def mean_loss(made, data):
    total = count = 0.0
    with torch.no_grad(), params.evaluating(made.model):
        for inputs, labels in made.run.batches(data, len(data)):
            total += float(answer_loss(made.model, inputs, labels))
            count += int((labels[:, 1:] != -100).sum())
    return total / count


@pytest.mark.parametrize("lora", [False, True])
def test_what_all_weights_earned_is_the_drop_of_the_loss(lora, tmp_path, model):
    """Full batches and small steps: the sum of ω tends to L(start) − L(end)."""
    data = rows(8)
    methods = [*([LoRA(r=4)] if lora else []), SI(strength=1e-9)]
    settings = PLAIN | {"steps": 24, "batch": 8, "train_rows": data, "learning_rate": 0.02 if lora else 0.001}
    made = trainer(methods, tmp_path, model.double(), **settings)
    before = mean_loss(made, data)
    made.train()
    fell = before - mean_loss(made, data)
    assert fell > 0.2
    assert sum(float(t.sum()) for t in made.stack.methods[-1]._drops.values()) == pytest.approx(fell, rel=0.05)


def test_it_takes_the_gradient_before_the_pull_and_before_clipping(tmp_path):
    made = train([SI(strength=3.0)], tmp_path)
    method, learning = made.stack.methods[0], params.trainable(made.model)
    before = {name: t.clone() for name, t in method._drops.items()}
    slopes, moves = ({n: torch.randn_like(p) for n, p in learning.items()} for _ in range(2))
    for name, p in learning.items():
        p.grad = slopes[name].clone()
    made.stack.edit_gradients(made.model, made.run)
    assert any((p.grad - slopes[n]).abs().max() > 1e-3 for n, p in learning.items()), "the pull does not act"
    with torch.no_grad():
        for name, p in learning.items():
            p.grad *= 0.01
            p += 0.1 * moves[name]
    made.stack.on_step_end(made.model, made.run)
    for name in learning:
        wanted = before[name] - slopes[name] * 0.1 * moves[name]
        torch.testing.assert_close(method._drops[name], wanted, rtol=1e-3, atol=1e-5)


def test_gradient_is_strength_times_importance_times_distance(tmp_path):
    made = train([SI(strength=0.3)], tmp_path)
    method = made.stack.methods[0]
    importance = {name: torch.rand_like(p) for name, p in params.trainable(made.model).items()}
    method.pull._importance = list(importance.values())
    for p in params.trainable(made.model).values():
        p.grad = torch.zeros_like(p)
    method.edit_gradients(made.model, made.run)
    for name, p in params.trainable(made.model).items():
        torch.testing.assert_close(p.grad, 0.3 * importance[name] * (p.detach() - made.run.start[name]))


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_one_task_is_l2sp_with_the_strength_of_the_prior(form, tmp_path):
    # in float64: Adam makes a rounding of small gradients in float32 larger than what is to be seen
    one, other = (tiny_model(tiny_tokenizer()).double() for _ in range(2))
    held = stored(train([L2SP(strength=0.6, form=form)], tmp_path / "l2sp", one).model)
    si = SI(strength=0.3, prior=2.0, form=form)
    assert distance(stored(train([si], tmp_path / "si", other).model), held) < 1e-6


def test_without_a_prior_the_first_task_is_only_recorded(tmp_path):
    plain = merged(train([], tmp_path / "plain").model)
    run, said = in_sequence(tmp_path, 1), []
    run.say = said.append
    made = train([SI(prior=0.0, strength=5.0)], tmp_path / "1", run=run)
    assert same_bits(merged(made.model), plain)
    assert any("only recorded" in line for line in said)
    made.release()
    after = merged(made.model)
    free = stored(train([], tmp_path / "free", copy.deepcopy(made.model), train_rows=rows(16, 3)).model)
    held = train([SI(prior=0.0, strength=50.0)], tmp_path / "2", made.model, train_rows=rows(16, 3),
                 run=in_sequence(tmp_path, 2))  # fmt: skip
    importance = load_file(tmp_path / "si" / "02.safetensors")
    now = stored(held.model)

    def weighted(weights):
        return sum(float((importance[n] * (weights[n] - after[n]).square()).sum()) for n in importance)

    assert weighted(now) < 0.7 * weighted(free)


def test_importance_is_the_formula_scaled_to_mean_one(tmp_path):
    made = train([SI(damping=0.2)], tmp_path, run=in_sequence(tmp_path, 1))
    drops = {n: t.double() for n, t in made.stack.methods[0]._drops.items()}
    moves = {n: (p.detach() - made.run.start[n]).double() for n, p in params.trainable(made.model).items()}
    count = sum(t.numel() for t in drops.values())
    damping = 0.2 * sum(float(t.square().sum()) for t in moves.values()) / count
    raw = {n: drops[n].clamp_min(0) / (moves[n].square() + damping) for n in drops}
    whole = sum(float(t.sum()) for t in raw.values())
    found = load_file(tmp_path / "si" / "02.safetensors")
    assert found.keys() == raw.keys()
    assert any((t < 0).any() for t in drops.values()), "nothing is cut off at zero"
    for name in raw:
        torch.testing.assert_close(found[name].double(), 1.0 + raw[name] * count / whole, rtol=1e-4, atol=1e-5)


def test_without_steps_that_move_nothing_is_important(tmp_path):
    made = train([SI()], tmp_path, learning_rate=0.0, run=in_sequence(tmp_path, 1))
    assert not any(t.any() for t in made.stack.methods[0]._drops.values())
    assert all(bool((t == 1).all()) for t in load_file(tmp_path / "si" / "02.safetensors").values())


def test_the_record_does_not_depend_on_accumulation(tmp_path, model):
    def record(folder, batch, accumulate, weights):
        settings = {"batch": batch, "gradient_accumulation_steps": accumulate, "adam_epsilon": 1e-4}
        return train([SI()], tmp_path / folder, weights.double(), **settings).stack.methods[0]._drops

    whole = record("whole", 8, 1, copy.deepcopy(model))
    split = record("split", 1, 8, copy.deepcopy(model))
    assert max(float(t.abs().max()) for t in whole.values()) > 1e-3
    assert distance(whole, split) < 1e-7


def test_a_resumed_task_leaves_the_same_importance(tmp_path):
    saving = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    train([SI()], tmp_path / "a" / "1", run=in_sequence(tmp_path / "a", 1), **saving)
    folder = tmp_path / "b" / "1"
    with pytest.raises(Killed):
        train([SI()], folder, run=in_sequence(tmp_path / "b", 1), callbacks=[StopAt(5)], **saving)
    trainer([SI()], folder, run=in_sequence(tmp_path / "b", 1), **saving).train(resume_from_checkpoint=True)
    one, other = (load_file(tmp_path / which / "si" / "02.safetensors") for which in "ab")
    assert same_bits(one, other)


def test_with_lora_the_importance_outlives_the_adapter(tmp_path):
    def once(index, model=None):
        made = train([LoRA(r=4), SI(strength=5.0)], tmp_path / str(index), model, run=in_sequence(tmp_path, index),
                     train_rows=rows(16, index))  # fmt: skip
        made.release()
        return made

    first = once(1)
    second = once(2, settled(first.model))
    method = second.stack.methods[1]
    known = load_file(tmp_path / "si" / "02.safetensors")
    pairs = params.lora_pairs(second.model)
    assert method.pull.pairs
    for name, pair in pairs.items():
        r, c = (known[key] for key in product_keys(name))
        assert r.shape == (pair.B.shape[0],)
        assert c.shape == (pair.A.shape[1],)
        assert float(r.sum()) == pytest.approx(float(c.sum()), rel=1e-4)
        assert float(r.min()) > 0, "the prior holds everywhere"
        assert float(r.max()) > 1.01 * float(r.min())
    count = sum(p.B.shape[0] * p.A.shape[1] for p in pairs.values())
    total = sum(float(known[product_keys(name)[0]].sum()) for name in pairs)
    assert total == pytest.approx(2 * count, rel=1e-4), "prior and one task, each of mean 1"
    assert method.pull.value(1.0) > 0
    assert finite(second.model)


def test_squares_use_the_product_not_the_factors(tmp_path):
    made = train([LoRA(r=4), SI()], tmp_path, run=in_sequence(tmp_path, 1))
    method = made.stack.methods[1]
    pairs = params.lora_pairs(made.model)
    moved = {n: (pair.scaling * pair.B @ pair.A).detach().double().square() for n, pair in pairs.items()}
    count = sum(t.numel() for t in moved.values())
    damping = 0.1 * sum(float(t.sum()) for t in moved.values()) / count
    found = method.importance(made.model, made.run)
    wanted = {}
    for name in pairs:
        drops = (method._drops[key].double() for key in product_keys(name))
        wanted[name] = path_integral.product_importance(*drops, moved[name].sum(1), moved[name].sum(0), damping)
    whole = sum(float(r.sum()) for r, _ in wanted.values())
    for name, sums in wanted.items():
        for key, value in zip(product_keys(name), sums):
            torch.testing.assert_close(found[key].double(), value * count / whole, rtol=1e-4, atol=1e-6)


def test_too_stiff_for_sgd_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.si\.strength: .*form: proximal") as caught:
        train([SI(strength=1e5)], tmp_path, optim="sgd")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="damping"):
        SI(damping=0)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_without_a_prior_the_first_task_is_plain_with_an_adapter_too(form, tmp_path):
    """All-zero importance of a product must not become 0/0, whatever the adapter's scale."""
    plain = train([LoRA(r=2, alpha=64)], tmp_path / "plain")
    held = train([LoRA(r=2, alpha=64), SI(prior=0.0, form=form)], tmp_path / "held")
    assert distance(stored(plain.model), stored(held.model)) < 1e-7
