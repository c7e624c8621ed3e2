"""Label smoothing against torch's own, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from families import family_model
from tiny import tiny_model, tiny_tokenizer
from training_kit import rows, stored, train
from weighing_kit import batch_of, dense_logits, labelled, run_of, targets

from retain.errors import ConfigError
from retain.methods.label_smoothing import LabelSmoothing
from retain.methods.replay import Replay
from retain.models import params


def loss(model, ids, labels, source=None, **settings):
    return LabelSmoothing(**settings).batch_loss(batch_of(model, ids, labels, source), run_of(model))


@pytest.mark.parametrize("share", [0.1, 0.7])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt_neox", "opt", "cohere", "granite"])
def test_value_and_gradient_are_torchs(kind, share):
    model = family_model(kind).double()
    ids, labels = labelled()
    found = loss(model, ids, labels, strength=share)
    logits = dense_logits(model, ids, labels)
    smooth = F.cross_entropy(logits, targets(labels), label_smoothing=share, reduction="sum")
    wanted = smooth - F.cross_entropy(logits, targets(labels), reduction="sum")
    assert abs(float(wanted.detach())) > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    learning = params.trainable(model)
    slopes = torch.autograd.grad(found, list(learning.values()))
    for name, slope, truth in zip(learning, slopes, torch.autograd.grad(wanted, list(learning.values()))):
        torch.testing.assert_close(slope, truth, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize(("boost", "share"), [(4.0, 0.4), (64.0, 0.9)])
def test_a_boost_leaves_something_to_be_learned(boost, share):
    """The stack multiplies by the boost; above 1 the label itself would be unlearned."""
    model = family_model("llama").double()
    ids, labels = labelled()
    boosted = LabelSmoothing(strength=0.1)
    boosted.boost = boost
    found = boost * boosted.batch_loss(batch_of(model, ids, labels), run_of(model))
    torch.testing.assert_close(found, loss(model, ids, labels, strength=0.1) * share / 0.1, rtol=1e-12, atol=0)


def test_a_whole_step_is_that_of_the_smoothed_loss(tmp_path):
    """One step of SGD in the trainer against the dense loss by hand, over micro-batches of different lengths."""
    model = tiny_model(tiny_tokenizer()).double()
    start = stored(model)
    settings = {"steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    made = train([LabelSmoothing(strength=0.2)], tmp_path, model, batch=2, gradient_accumulation_steps=2, **settings)
    truth = tiny_model(tiny_tokenizer()).double()
    total, count = 0.0, 0
    for seen in made.seen:
        for ids, labels in zip(seen["ids"], seen["labels"]):
            ids, labels = torch.tensor([ids]), torch.tensor([labels])
            logits, y = dense_logits(truth, ids, labels), targets(labels)
            total, count = total + F.cross_entropy(logits, y, label_smoothing=0.2, reduction="sum"), count + len(y)
    (total / count).backward()
    after = stored(made.model)
    for name, p in truth.named_parameters():
        torch.testing.assert_close(after[name], start[name] - 1e-2 * p.grad, rtol=0, atol=1e-7)


def test_its_minimum_is_at_finite_logits():
    """Of a head that can say anything: p of the label goes to 1 − ε + ε/V, not to 1."""
    model = family_model("gpt_neox").double()
    ids, labels = labelled(1, 4)
    labels[:, :3] = -100
    bias = torch.nn.Parameter(torch.zeros(90, dtype=torch.float64))
    model.lm_head.weight.requires_grad_(False).zero_()
    model.lm_head.bias = bias
    optimizer = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        plain = F.cross_entropy(dense_logits(model, ids, labels), targets(labels))
        total = plain + loss(model, ids, labels, strength=0.2)
        total.backward()
        return total

    optimizer.step(closure)
    p = torch.softmax(bias.detach(), -1)[targets(labels)[0]]
    assert float(p) == pytest.approx(0.8 + 0.2 / 90, abs=1e-3)


def test_replayed_rows_keep_their_labels():
    model = family_model("llama").double()
    ids, labels = labelled(4)
    new = torch.tensor([0, 2])
    some = loss(model, ids, labels, source=[0, 1, 0, 1])
    torch.testing.assert_close(some, loss(model, ids[new], labels[new]))
    everything = loss(model, ids, labels, source=[0, 1, 0, 1], rows="all")
    torch.testing.assert_close(everything, loss(model, ids, labels))
    assert loss(model, ids, labels, source=[1, 1, 1, 1]) is None


def test_less_sure_of_what_it_learned(tmp_path):
    def surety(*methods):
        made = train(methods, tmp_path / str(len(methods)), steps=20, train_rows=rows(4))
        seen = made.seen[0]
        ids, labels = torch.tensor(seen["ids"]), torch.tensor(seen["labels"])
        with torch.no_grad(), params.evaluating(made.model):
            hidden = params.hidden_states(made.model, {"input_ids": ids})
            logits = (hidden @ params.head(made.model)[0].T)[:, :-1][labels[:, 1:] != -100]
        return float(torch.softmax(logits, -1).gather(1, targets(labels)[:, None]).mean())

    plain, smooth = surety(), surety(LabelSmoothing(strength=0.3))
    assert plain > 0.9
    assert smooth < plain - 0.1


def test_terms_add_up_beside_replay(tmp_path):
    made = train([Replay(fraction=0.25), LabelSmoothing()], tmp_path, steps=3)
    lines = [line for line in made.state.log_history if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/main"] + line["loss/label_smoothing"], rel=1e-3)


def test_flattened_rows_cannot_be_told_apart():
    model = family_model("llama").double()
    ids, labels = labelled(3)
    batch = batch_of(model, ids.flatten()[None], labels.flatten()[None], [0])
    batch.source = torch.tensor([0, 1, 0])
    with pytest.raises(ConfigError, match=r"methods\.label_smoothing\.rows: rows are flattened"):
        LabelSmoothing().batch_loss(batch, run_of(model))
