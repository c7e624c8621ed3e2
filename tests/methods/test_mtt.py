"""Mask the Target: everything but the label keeps its share, and the label is left alone."""

import copy

import pytest
import torch
from families import FAMILIES, family_model, take_steps, token_batch
from training_kit import train

from retain.errors import ConfigError
from retain.functional import divergence
from retain.functional.tiled_head import Head
from retain.functional.tiled_head import divergence as tiled
from retain.methods.context import Batch, Run
from retain.methods.lora import LoRA
from retain.methods.mtt import MTT
from retain.methods.replay import Replay
from retain.models import params

STRENGTH = 0.7


def student_and_run(model, steps=2, replay=False):
    """A model some steps after its start, and the run that remembers the start."""
    run = Run(directory=None, model=model, start=params.snapshot(params.trainable(model)), has_replay=replay)
    take_steps(model, steps)
    return model, run


def labelled(ids):
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, -2:] = -100
    return labels


def loss(model, run, ids, source=None, labels=None, **settings):
    method = MTT(strength=STRENGTH, **settings)
    method.on_task_start(model, run)
    source = torch.zeros(len(ids), dtype=torch.long) if source is None else source
    hidden = params.hidden_states(model, {"input_ids": ids})
    labels = labelled(ids) if labels is None else labels
    return method.batch_loss(Batch({"input_ids": ids}, labels, hidden, source), run)


def slow(student, teacher, labels, temperature, direction):
    """Token by token: the label's column is cut out, what is left is normalised, and compared by hand."""
    total = student.new_zeros(())
    for z, z0, y in zip(student, teacher, labels.tolist()):
        keep = [i for i in range(len(z)) if i != y]
        p, p0 = (torch.softmax(t[keep] / temperature, -1) for t in (z, z0))
        if direction == "jsd":
            m = (p + p0) / 2
            total = total + ((p0 * (p0 / m).log()).sum() + (p * (p / m).log()).sum()) / 2 * temperature**2
        else:
            a, b = (p0, p) if direction == "forward" else (p, p0)
            total = total + (a * (a / b).log()).sum() * temperature**2
    return total


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_identical_teacher_gives_zero_and_no_gradient(kind):
    model, run = student_and_run(family_model(kind).double(), steps=0)
    value = loss(model, run, token_batch())
    assert abs(float(value.detach())) < 1e-9
    slopes = torch.autograd.grad(value, list(params.trainable(model).values()), allow_unused=True)
    assert max(float(s.abs().max()) for s in slopes if s is not None) < 1e-9


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_value_and_gradient_are_the_dense_ones(kind, temperature, direction):
    model = family_model(kind).double()
    teacher = copy.deepcopy(model)
    model, run = student_and_run(model)
    ids = token_batch()
    mask = labelled(ids)[:, 1:] != -100
    z, z0, y = model(ids).logits[:, :-1][mask], teacher(ids).logits[:, :-1][mask].detach(), ids[:, 1:][mask]
    wanted = STRENGTH * slow(z, z0, y, temperature, direction)
    found = loss(model, run, ids, temperature=temperature, direction=direction)
    assert float(wanted.detach()) > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    if direction == "forward":
        masked = (divergence.mask_target(t, y) for t in (z0, z))
        torch.testing.assert_close(STRENGTH * divergence.kl(*masked, temperature).sum(), wanted, rtol=1e-6, atol=1e-8)
    learning = list(params.trainable(model).values())
    for slope, truth in zip(torch.autograd.grad(found, learning), torch.autograd.grad(wanted, learning)):
        torch.testing.assert_close(slope, truth, rtol=1e-5, atol=1e-8)


class Direct:
    """A method over given logits: the hidden states are the logits, the head is the identity."""

    def __init__(self, words, **settings):
        self.method = MTT(strength=1.0, **settings)
        self.head = Head(torch.eye(words, dtype=torch.float64))
        self.method._teacher = type("Fixed", (), {"head": lambda _: self.head})()

    def __call__(self, student, teacher, labels):
        return self.method.compare(student, self.head, teacher, labels)


def logits(words, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(count, words, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return student, teacher, torch.randint(words, (count,), generator=generator)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_the_label_gets_no_gradient_and_all_others_do(direction):
    student, teacher, labels = logits(9)
    student.requires_grad_(True)
    (slope,) = torch.autograd.grad(Direct(9, direction=direction)(student, teacher, labels).sum(), student)
    assert not slope.gather(1, labels[:, None]).any()
    assert (slope.scatter(1, labels[:, None], 1.0).abs() > 1e-9).all()


def test_with_two_tokens_there_is_nothing_left_to_keep():
    student, teacher, labels = logits(2)
    student.requires_grad_(True)
    value = Direct(2)(student, teacher, labels)
    assert not value.any()
    assert not torch.autograd.grad(value.sum(), student)[0].any()


def test_shifts_and_permutations_change_nothing():
    student, teacher, labels = logits(9)
    ask = Direct(9)
    value = ask(student, teacher, labels)
    assert (value > 1e-3).all()
    label = torch.nn.functional.one_hot(labels, 9)
    for moved in (student + 5.0, student + 40.0 * label, student - 40.0 * label):
        torch.testing.assert_close(ask(moved, teacher, labels), value)
    torch.testing.assert_close(ask(student, teacher + 40.0 * label, labels), value)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ask(student[:, order], teacher[:, order], order.argsort()[labels]), value)
    whole = tiled(student, ask.head, teacher, ask.head)
    assert (whole - value).abs().max() > 1e-2, "the label counts in the whole divergence"


def test_only_the_chosen_rows_count():
    model, run = student_and_run(family_model("llama").double(), replay=True)
    ids, source = token_batch(4), torch.tensor([0, 1, 0, 1])
    parts = {which: loss(model, run, ids, source, rows=which).detach() for which in ("all", "new", "replay")}
    torch.testing.assert_close(parts["all"], parts["new"] + parts["replay"])
    alone = [loss(model, run, ids[[i]], labels=labelled(ids)[[i]]) for i in (1, 3)]
    torch.testing.assert_close(parts["replay"], torch.stack(alone).sum().detach())
    with pytest.raises(ConfigError, match=r"^methods\.mtt\.rows: rows are flattened"):
        loss(model, run, ids, source[:2], rows="new")
    run.has_replay = False
    with pytest.raises(ConfigError, match=r"^methods\.mtt\.rows: 'replay' without"):
        loss(model, run, ids, rows="replay")


def test_it_does_not_oppose_what_is_learned():
    """Under the whole divergence the label stops at (1 + λ p⁰_y) / (1 + λ), under this one it goes on to 1."""
    _, teacher, labels = logits(9)
    ask, strength = Direct(9), 5.0
    identity = ask.head

    def learned(term):
        student = teacher.clone().requires_grad_(True)
        for _ in range(3000):
            right = torch.log_softmax(student, -1).gather(1, labels[:, None])[:, 0]
            (slope,) = torch.autograd.grad((strength * term(student) - right).sum(), student)
            student = (student - 0.5 * slope).detach().requires_grad_(True)
        return torch.softmax(student.detach(), -1)

    p0 = torch.softmax(teacher, -1)
    right = p0.gather(1, labels[:, None])[:, 0]
    whole = learned(lambda z: tiled(z, identity, teacher, identity)).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(whole, (1 + strength * right) / (1 + strength), rtol=1e-3, atol=1e-5)
    masked = learned(lambda z: ask(z, teacher, labels))
    assert (masked.gather(1, labels[:, None]) > 0.99).all()
    others = [t.scatter(1, labels[:, None], 0) for t in (masked, p0)]
    now, past = (t / t.sum(-1, keepdim=True) for t in others)
    torch.testing.assert_close(now, past, rtol=1e-2, atol=1e-4)


def test_it_keeps_the_other_tokens_with_lora_and_replay(tmp_path):
    def drift(*methods):
        made = train([LoRA(r=4), Replay(fraction=0.25), *methods], tmp_path / str(len(methods)), steps=8)
        micro = made.seen[0]
        with torch.no_grad(), params.evaluating(made.model):
            ids, labels = torch.tensor(micro["ids"]), torch.tensor(micro["labels"])
            mask = labels[:, 1:] != -100
            hidden = [
                params.hidden_states(made.model, {"input_ids": ids}, w)[:, :-1][mask] for w in (None, made.run.start)
            ]
            now, past = (h @ params.head(made.model)[0].T for h in hidden)
            masked = (divergence.mask_target(t, labels[:, 1:][mask]) for t in (past, now))
            return float(divergence.kl(*masked).mean())

    assert drift(MTT(strength=5.0)) < 0.6 * drift()
