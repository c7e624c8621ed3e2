"""Distillation: the dense divergence to the start, its gradient, and a teacher that never moves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, family_model, take_steps, token_batch
from training_kit import same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.functional import divergence
from retain.methods.context import Batch, Run
from retain.methods.distill import Distill
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.models import params

STRENGTH = 0.7


def student_and_run(model, steps=2, replay=False):
    """A model some steps after its start, and the run that remembers the start."""
    run = Run(directory=None, model=model, start=params.snapshot(params.trainable(model)), has_replay=replay)
    take_steps(model, steps)
    return model, run


def batch_of(model, ids, labels, source=None, mask=None):
    inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    hidden = params.hidden_states(model, inputs)
    return Batch(inputs, labels, hidden, torch.zeros(len(ids), dtype=torch.long) if source is None else source)


def loss(model, run, batch, **settings):
    method = Distill(**({"strength": STRENGTH} | settings))
    method.on_task_start(model, run)
    return method.batch_loss(batch, run)


def masked_labels(ids):
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, -2:] = -100
    return labels


def dense(student_logits, teacher_logits, mask, temperature, direction):
    """The sum over supervised tokens by torch's own kl_div on whole distributions."""
    p = torch.log_softmax(student_logits[:, :-1][mask] / temperature, -1)
    p0 = torch.log_softmax(teacher_logits[:, :-1][mask] / temperature, -1)
    if direction == "jsd":
        return divergence.jsd(teacher_logits[:, :-1][mask], student_logits[:, :-1][mask], temperature=temperature).sum()
    first, second = (p, p0) if direction == "forward" else (p0, p)
    return temperature**2 * F.kl_div(first, second, reduction="sum", log_target=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_value_and_gradient_are_zero_at_the_start(kind):
    model, run = student_and_run(family_model(kind).double(), steps=0)
    ids = token_batch()
    value = loss(model, run, batch_of(model, ids, masked_labels(ids)), temperature=2.0)
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
    labels = masked_labels(ids)
    mask = labels[:, 1:] != -100
    with torch.no_grad():
        teacher_logits = teacher(ids).logits
    wanted = STRENGTH * dense(model(ids).logits, teacher_logits, mask, temperature, direction)
    found = loss(model, run, batch_of(model, ids, labels), temperature=temperature, direction=direction)
    assert float(wanted.detach()) > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    learning = params.trainable(model)
    slopes = torch.autograd.grad(found, list(learning.values()))
    truths = torch.autograd.grad(wanted, list(learning.values()))
    for name, slope, truth in zip(learning, slopes, truths):
        torch.testing.assert_close(slope, truth, rtol=1e-5, atol=1e-8, msg=name)


def test_padding_has_no_influence():
    model, run = student_and_run(family_model("llama").double())
    ids = token_batch()
    labels = masked_labels(ids)
    plain = loss(model, run, batch_of(model, ids, labels, mask=torch.ones_like(ids)))
    longer, more = F.pad(ids, (0, 4), value=5), F.pad(labels, (0, 4), value=-100)
    mask = F.pad(torch.ones_like(ids), (0, 4))
    padded = loss(model, run, batch_of(model, longer, more, mask=mask))
    torch.testing.assert_close(plain, padded, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_teacher_is_a_separately_loaded_base(kind):
    base = family_model(kind)
    model = LoRA(r=3).prepare_model(family_model(kind), Run(directory=None))
    model, run = student_and_run(model)
    ids = token_batch()
    with torch.no_grad():
        past = params.hidden_states(model, {"input_ids": ids}, run.start)
        assert (past - params.hidden_states(base, {"input_ids": ids})).abs().max() < 1e-6
        now = params.hidden_states(model, {"input_ids": ids})
        assert (past - now).abs().max() > 1e-3
    found = loss(model, run, batch_of(model, ids, masked_labels(ids)))
    mask = masked_labels(ids)[:, 1:] != -100
    wanted = STRENGTH * dense(model(ids).logits, base(ids).logits.detach(), mask, 1.0, "forward")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_only_the_chosen_rows_count():
    model, run = student_and_run(family_model("llama").double(), replay=True)
    ids = token_batch(4)
    labels, source = masked_labels(ids), torch.tensor([0, 1, 0, 1])

    def value(chosen, which):
        batch = batch_of(model, ids[chosen], labels[chosen], source[chosen])
        found = loss(model, run, batch, rows=which)
        return None if found is None else found.detach()

    everything, replayed, new = torch.arange(4), torch.tensor([1, 3]), torch.tensor([0, 2])
    torch.testing.assert_close(value(everything, "replay"), value(replayed, "all"))
    torch.testing.assert_close(value(everything, "new"), value(new, "all"))
    torch.testing.assert_close(value(everything, "auto"), value(everything, "replay"))
    torch.testing.assert_close(value(everything, "all"), value(everything, "new") + value(everything, "replay"))
    assert value(new, "replay") is None


def test_rows_that_are_not_chosen_get_no_gradient():
    model, run = student_and_run(family_model("llama").double(), replay=True)
    ids = token_batch()
    batch = batch_of(model, ids, masked_labels(ids), torch.tensor([0, 1, 0]))
    (slope,) = torch.autograd.grad(loss(model, run, batch, rows="replay"), batch.hidden)
    assert not slope[[0, 2]].any()
    assert slope[1].any()


def test_the_teacher_does_not_move_while_the_student_trains(tmp_path, model):
    start = stored(model)
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        before = params.hidden_states(model, {"input_ids": ids})
    made = train([Distill(strength=1.0)], tmp_path, model)
    assert same_bits(made.run.start, start)
    with torch.no_grad(), params.evaluating(made.model):
        after = params.hidden_states(made.model, {"input_ids": ids}, made.run.start)
        now = params.hidden_states(made.model, {"input_ids": ids})
    assert torch.equal(before, after)
    assert (now - before).abs().max() > 1e-3


@pytest.mark.parametrize("methods", [[Distill()], [LoRA(), Distill()]], ids=["full", "lora"])
def test_the_teacher_computes_in_the_precision_of_the_student(methods, tmp_path):
    made = train(methods, tmp_path, steps=2, bf16=True)
    first, second = (line["loss/distill"] for line in made.state.log_history if "loss" in line)
    assert first == 0.0  # nothing has moved yet, so any difference would be one of rounding
    assert second > 0.0


def test_it_holds_the_student_nearer_to_the_start(tmp_path):
    def divergence_after(*methods):
        made = train(methods, tmp_path / str(len(methods)), steps=8)
        ids = torch.tensor([row[:12] for row in made.seen[0]["ids"]])
        with torch.no_grad(), params.evaluating(made.model):
            logits = params.hidden_states(made.model, {"input_ids": ids}) @ params.head(made.model)[0].T
            past = params.hidden_states(made.model, {"input_ids": ids}, made.run.start)
            past = past @ params.head(made.model, made.run.start)[0].T
        return float(divergence.kl(past, logits).mean())

    assert divergence_after(Distill(strength=5.0)) < 0.8 * divergence_after()


def test_the_logged_terms_add_up_to_the_loss(tmp_path):
    made = train([Distill(strength=1.0)], tmp_path, gradient_accumulation_steps=2, batch=2)
    lines = [line for line in made.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/main"] + line["loss/distill"], rel=1e-3)
    assert lines[-1]["loss/distill"] > 0


def test_settings_without_effect_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"rows: 'replay' without replayed rows"):
        train([Distill(rows="replay")], tmp_path)
    with pytest.raises(ConfigError, match="teacher still equals the student"):
        train([Distill()], tmp_path, steps=9, learning_rate=1e-30)
    with pytest.raises(ConfigError, match="temperature"):
        Distill(temperature=0)


def test_with_replay_it_applies_to_the_replayed_rows(tmp_path):
    made = trainer([Replay(fraction=0.5), Distill()], tmp_path)
    made.train()
    assert made.stack.methods[1]._rows == "replay"
