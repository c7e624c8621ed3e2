"""OGD: the realised AdamW step stays out of old gradients' span; projecting gradients alone leaks."""

import dataclasses

import numpy as np
import pytest
import torch
from families import family_model, token_batch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_kit import Killed, StopAt, distance, merged, other_rows, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods.context import Run, answer_loss
from retain.methods.lora import LoRA
from retain.methods.ogd import OGD
from retain.models import machine, params, passes
from retain.models.load import settled
from retain.models.row_scores import right_logits

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def task(folder, index, methods, model=None, new="task", **settings):
    """One task of a sequence; later ones learn other rows."""
    new = rows(16, 50 * index) if isinstance(new, str) else new
    place = folder / str(index)
    run = Run(place, task=f"t{index}", task_index=index, shared=folder, new_rows=new, say=lambda line: None)
    made = train(methods, place, model, run=run, **{"train_rows": rows(16, 50 * index), "old": other_rows()} | settings)
    made.release()
    return made


def file_of(folder, index):
    return load_file(folder / "ogd" / f"{index:02d}.safetensors")


def flat(tensors):
    """Q [P, k] of what a file or a method holds."""
    return torch.cat([part.flatten(1).T for part in tensors]).double()


def change_of(made):
    method = made.stack.methods[-1]
    return torch.cat([(p.detach() - start).double().flatten() for p, start in method._held])


def logits_of(model, batches):
    with torch.no_grad(), params.evaluating(model):
        return torch.stack([right_logits(model, *batch) for batch in batches])


def outside(made, change):
    basis = flat(made.stack.methods[-1]._directions)
    return float((basis.T @ change).norm())


# -- the promise -------------------------------------------------------------------------------------------
def loop(folder, steps, lora=False, realised=True, directions=20):
    """Training by hand under AdamW with weight decay, on random tokens; what has started, with its method."""
    model = tiny_model(tiny_tokenizer(), num_hidden_layers=1)
    made = trainer([*([LoRA(r=4)] if lora else []), OGD(directions=directions)], folder, model, old=other_rows())
    model, method, run = made.model, made.stack.methods[-1], made.run
    run.start = params.snapshot(params.trainable(model))
    method.on_task_start(model, run)
    optimizer = torch.optim.AdamW(params.trainable(model).values(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        ids = token_batch(rows=2, length=8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        method.edit_gradients(model, run)
        optimizer.step()
        if realised:
            method.on_step_end(model, run)
        optimizer.zero_grad()
    return made


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_after_200_steps_of_adamw_with_decay_the_change_is_outside(lora, tmp_path):
    made = loop(tmp_path, 200, lora)
    assert len(made.stack.methods[-1]._directions[0]) == 20
    assert outside(made, change_of(made)) < 1e-6
    assert float(change_of(made).norm()) > 1


def test_projecting_gradients_alone_leaks(tmp_path):
    """The paper's rule under AdamW, which divides each entry by its own size and shrinks the weights."""
    made = loop(tmp_path, 60, realised=False)
    change = change_of(made)
    assert outside(made, change) > 0.01 * float(change.norm())
    assert outside(made, change) > 1e-2


def test_stored_logits_do_not_change_to_first_order(tmp_path):
    """A step h along what is left changes them with h², along what was taken out with h."""

    model = tiny_model(tiny_tokenizer(), seed=1, num_hidden_layers=2).double()
    made = trainer([OGD(directions=12)], tmp_path, model, old=other_rows(), **SGD)
    method, run = made.stack.methods[0], made.run
    run.start = params.snapshot(params.trainable(model))
    method.on_task_start(model, run)
    tokens = tokens_of(method, run, run.old, 12)
    before, start = logits_of(model, tokens), stored(model)
    learning = list(params.trainable(model).values())
    slope, _, _ = passes.gradients(model, learning, run.batches(rows(4), 4), answer_loss)

    def worst(size, keep):
        model.load_state_dict(start)
        for p, g in zip(learning, slope):
            p.grad = g.clone()
        if keep:
            method.edit_gradients(model, run)
        with torch.no_grad():
            for p in learning:
                p.sub_(size * p.grad)
        return float((logits_of(model, tokens) - before).abs().max())

    assert worst(1e-4, True) / worst(1e-5, True) == pytest.approx(100, rel=0.2)
    assert worst(1e-4, False) / worst(1e-5, False) == pytest.approx(10, rel=0.2)
    assert worst(1e-5, True) < 0.01 * worst(1e-5, False)


def tokens_of(method, run, given, number, index=None):
    """Rows with a single learned token each, as the method draws them from given rows."""
    place = dataclasses.replace(run, task_index=index or run.task_index)
    order = np.random.default_rng([run.seed, place.task_index]).permutation(len(given))
    return list(method._tokens(given.select(order[:number]), place))[:number]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "phi"])
def test_the_right_logit_is_the_models_own(kind):
    model = family_model(kind)
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, [4, 7]] = ids[0, [4, 7]]
    own = model(input_ids=ids).logits[0]
    wanted = own[3, ids[0, 4]] + own[6, ids[0, 7]]
    torch.testing.assert_close(right_logits(model, {"input_ids": ids}, labels), wanted, rtol=1e-4, atol=1e-4)


def test_directions_span_the_gradients_of_right_tokens(tmp_path):
    """Against whole logits and lstsq in float64; every row gives one token before any gives two."""
    model = tiny_model(tiny_tokenizer(), num_hidden_layers=2).double()
    made = trainer([OGD(directions=15)], tmp_path, model, old=other_rows())
    method, run = made.stack.methods[0], made.run
    run.start = params.snapshot(params.trainable(model))
    method.on_task_start(model, run)
    basis = flat(method._directions).numpy()
    tokens = tokens_of(method, run, run.old, 15)
    assert all(int((labels != -100).sum()) == 1 for _, labels in tokens)
    assert len({tuple(inputs["input_ids"][0].tolist()) for inputs, _ in tokens[:12]}) == 12
    found = []
    for inputs, labels in tokens[:15]:
        place = int((labels[0] != -100).nonzero())
        logit = model.eval()(**inputs).logits[0, place - 1, labels[0, place]]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(logit, [*params.trainable(model).values()])]))
    gradients = torch.stack(found, 1).numpy()
    rest = gradients - basis @ np.linalg.lstsq(basis, gradients, rcond=None)[0]
    assert np.abs(rest).max() < 1e-5 * np.abs(gradients).max(), "the head of the host works in float32"
    assert basis.shape[1] <= 15
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)


# -- limits ------------------------------------------------------------------------------------------------
def test_without_directions_it_is_plain_training_bit_for_bit(tmp_path, monkeypatch):
    def none(self, model, run):
        self._held = [(p, run.start[name]) for name, p in params.trainable(model).items()]
        self._directions = [p.new_zeros(0, *p.shape) for p, _ in self._held]

    monkeypatch.setattr(OGD, "on_task_start", none)
    made = train([OGD()], tmp_path / "none", weight_decay=0.1)
    assert same_bits(stored(made.model), stored(train([], tmp_path / "plain", weight_decay=0.1).model))


def test_where_directions_span_everything_nothing_moves(tmp_path):
    model = tiny_model(tiny_tokenizer()).double()
    for name, p in model.named_parameters():
        p.requires_grad_(name == "model.norm.weight")
    before = stored(model)
    made = train([OGD(directions=200)], tmp_path, model, weight_decay=0.1, old=rows(40, 100))
    assert len(made.stack.methods[0]._directions[0]) == len(before["model.norm.weight"])
    assert distance(stored(made.model), before) < 1e-13
    share = [line["ogd/share"] for line in made.state.log_history if "ogd/share" in line]
    assert share == pytest.approx([1, 0, 0, 0], abs=1e-9) or share == pytest.approx([1] * 4)


def test_over_plain_descent_it_is_the_papers_rule(tmp_path, monkeypatch):
    settings = {"old": other_rows(), "steps": 6, **SGD}
    whole = train([OGD(directions=12)], tmp_path / "whole", tiny_model(tiny_tokenizer()).double(), **settings)
    monkeypatch.setattr(OGD, "on_step_end", lambda self, model, run: None)
    paper = train([OGD(directions=12)], tmp_path / "paper", tiny_model(tiny_tokenizer()).double(), **settings)
    assert distance(stored(whole.model), stored(paper.model)) < 1e-12
    plain = train([], tmp_path / "plain", tiny_model(tiny_tokenizer()).double(), **settings)
    assert distance(stored(whole.model), stored(plain.model)) > 1e-4


# -- tasks -------------------------------------------------------------------------------------------------
def test_directions_of_earlier_tasks_are_kept_and_grow(tmp_path):
    first = task(tmp_path, 1, [OGD(directions=6)], steps=2)
    start, after = file_of(tmp_path, 1), file_of(tmp_path, 2)
    second = task(tmp_path, 2, [OGD(directions=6)], first.model, steps=2)
    assert all(torch.equal(after[name][:6], part) for name, part in start.items())
    held = second.stack.methods[0]._directions
    assert len(held[0]) == 12
    assert torch.equal(flat(held), flat(after[name] for name in params.trainable(second.model)))
    torch.testing.assert_close(flat(held).T @ flat(held), torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    assert outside(second, change_of(second)) < 1e-6
    assert len(next(iter(file_of(tmp_path, 3).values()))) == 18
    assert not list(tmp_path.rglob("*.part"))


def test_the_same_rows_add_no_direction(tmp_path):
    settings = {"steps": 1, "learning_rate": 0.0, "old": rows(3, 50), "new": rows(3, 50)}
    task(tmp_path, 1, [OGD(directions=40)], tiny_model(tiny_tokenizer(), num_hidden_layers=1), **settings)
    counts = [len(next(iter(file_of(tmp_path, index).values()))) for index in (1, 2)]
    assert counts[0] == counts[1] > 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_directions_of_an_adapter_are_those_of_the_next_one(kind, tmp_path):
    """After a task the adapter is merged and a fresh one learns: what was kept are the gradients of its factors."""
    model = tiny_model(tiny_tokenizer(), kind=kind, num_hidden_layers=2).double()
    first = task(tmp_path, 1, [LoRA(r=3), OGD(directions=8)], model, steps=3)
    run = Run(tmp_path / "2", task_index=2, shared=tmp_path, say=lambda line: None)
    again = trainer([LoRA(r=3), OGD(directions=8)], run.directory, settled(first.model), old=other_rows(), run=run)
    again.stack.on_model_ready(again.model, run)
    run.start = params.snapshot(params.trainable(again.model))
    again.stack.on_task_start(again.model, run)
    method = again.stack.methods[1]
    names = [name for name in params.trainable(again.model) if "lora_B" in name]
    assert set(file_of(tmp_path, 2)) == set(names)
    basis = flat(method._directions)
    learning = [params.trainable(again.model)[name] for name in names]
    for one in tokens_of(method, run, rows(16, 50), 8, index=1):  # of the first task, in the model of the second
        found = passes.gradients(again.model.eval(), learning, [one], right_logits)[0]
        whole = torch.cat([g.flatten() for g in found])
        assert float(whole.norm()) > 1e-3
        assert float((whole - basis @ (basis.T @ whole)).norm()) < 1e-5 * float(whole.norm())


def test_every_task_begins_with_the_same_a_and_the_same_model(tmp_path):
    first = task(tmp_path, 1, [LoRA(r=3), OGD(directions=8)], steps=3)
    whole = merged(first.model)
    second = task(tmp_path, 2, [LoRA(r=3), OGD(directions=8)], settled(first.model), steps=3)
    for name, start in second.run.start.items():
        if "lora_A" in name:
            assert torch.equal(start, first.run.start[name])
            assert not torch.equal(start, params.trainable(second.model)[name])
        else:
            assert not start.any()
    assert outside(second, change_of(second)) < 1e-6
    assert distance(merged(second.model), whole) > 1e-4


def test_where_less_learns_a_part_of_each_direction_holds(tmp_path):
    first = task(tmp_path, 1, [OGD(directions=6)], steps=2)
    first.model.lm_head.weight.requires_grad_(False)
    second = task(tmp_path, 2, [OGD(directions=6)], first.model, steps=2)
    basis = flat(second.stack.methods[0]._directions)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    kept = flat(part for name, part in file_of(tmp_path, 2).items() if name != "lm_head.weight")
    order = flat(file_of(tmp_path, 2)[name] for name in params.trainable(second.model))
    assert kept.shape == order.shape
    assert float((order - basis @ (basis.T @ order)).norm()) < 1e-5


def test_a_killed_second_task_ends_with_the_same_bits(tmp_path):
    def two(folder, kill):
        saving = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
        first = task(folder, 1, [LoRA(r=3), OGD(directions=8)], steps=3)
        base = settled(first.model)
        weights = stored(base)
        if kill:
            with pytest.raises(Killed):
                task(folder, 2, [LoRA(r=3), OGD(directions=8)], base, callbacks=[StopAt(5)], **saving)
            base = tiny_model(tiny_tokenizer())
            base.load_state_dict(weights)
        run = Run(folder / "2", task="t2", task_index=2, shared=folder, new_rows=rows(16, 100), say=lambda line: None)
        team = [LoRA(r=3), OGD(directions=8)]
        again = trainer(team, folder / "2", base, run=run, train_rows=rows(16, 100), old=other_rows(), **saving)
        again.train(resume_from_checkpoint=kill)
        return stored(again.model), file_of(folder, 3)

    straight, killed = two(tmp_path / "straight", False), two(tmp_path / "killed", True)
    assert same_bits(straight[0], killed[0])
    assert same_bits(straight[1], killed[1])


# -- what is refused ---------------------------------------------------------------------------------------
def test_what_does_not_fit_is_one_line_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "spare_bytes", lambda device: 10**7)
    run = Run(tmp_path, shared=tmp_path, new_rows=rows(4), say=lambda line: None)
    with pytest.raises(
        ConfigError, match=r"methods\.ogd\.directions: 300 times [\d,]+ weights take .* 0\.01 GB are"
    ) as e:
        train([OGD()], tmp_path, run=run)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "ogd").exists()
    train([LoRA(r=1, targets="qv"), OGD(directions=10)], tmp_path, steps=1)


def test_known_directions_that_leave_no_room_are_refused_when_the_task_starts(tmp_path, monkeypatch):
    first = task(tmp_path, 1, [OGD(directions=6)], steps=1)
    size = sum(p.numel() for p in params.trainable(first.model).values())
    monkeypatch.setattr(machine, "spare_bytes", lambda device: 17 * 4 * size)
    with pytest.raises(ConfigError, match="18 times"):
        task(tmp_path, 2, [OGD(directions=6)], first.model, steps=1)


@pytest.mark.parametrize(
    ("team", "match"),
    [
        ([LoRA(kind="ia3"), OGD()], "no LoRA factor"),
        ([LoRA(r=2, dora=True), OGD()], "DoRA"),
    ],
)
def test_what_begins_anew_in_each_task_is_refused(team, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        train(team, tmp_path)


def test_an_adapter_that_learned_before_is_refused(tmp_path):
    made = train([LoRA(r=2)], tmp_path / "a", steps=1)
    made.release()
    with pytest.raises(ConfigError, match="learned before"):
        train([OGD()], tmp_path / "b", made.model)


@pytest.mark.parametrize("second", [LoRA(r=5), LoRA(r=3, targets="qv")])
def test_another_adapter_in_a_later_task_is_one_line(second, tmp_path):
    first = task(tmp_path, 1, [LoRA(r=3, targets="attention"), OGD(directions=4)], steps=1)
    if second.config.targets == "qv":  # fewer layers are a part
        made = task(tmp_path, 2, [second, OGD(directions=4)], settled(first.model), steps=1)
        assert outside(made, change_of(made)) < 1e-6
        return
    with pytest.raises(ConfigError, match=r"methods\.ogd: earlier tasks left no directions for '.*', or of") as e:
        task(tmp_path, 2, [second, OGD(directions=4)], settled(first.model), steps=1)
    assert "\n" not in str(e.value)


def test_a_quantised_base_has_one_adapter_for_all_tasks(tmp_path, monkeypatch):
    """It goes on learning, so that directions are of both factors as they are."""
    model = LoRA(r=2).prepare_model(tiny_model(tiny_tokenizer()), Run(tmp_path))
    run = Run(tmp_path / "1", shared=tmp_path, new_rows=rows(8), say=lambda line: None)
    method = OGD(directions=5)
    made = trainer([], tmp_path / "1", model, old=other_rows(), run=run)
    run.start = params.snapshot(params.trainable(model))
    params.causal(model).is_quantized = True
    method.on_task_start(model, made.run)
    assert len(method._held) == len(params.trainable(model))
    method.on_task_end(model, made.run)
    assert any("lora_A" in name for name in file_of(tmp_path, 2))


def test_no_learned_token_is_an_error(tmp_path):
    made = trainer([OGD()], tmp_path)
    made.run.batches = lambda rows, size: iter(())
    made.run.start = params.snapshot(params.trainable(made.model))
    with pytest.raises(ConfigError, match=r"methods\.ogd: no old row has a direction"):
        made.stack.methods[0].on_task_start(made.model, made.run)
