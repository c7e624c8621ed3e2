"""Losses at the start of a task: the dense truth, whatever is learned since, shuffled, padded or packed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import family_model, take_steps
from weighing_kit import dense_logits, labelled, run_of, targets

from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.start_scores import StartScores, sequences


def truth(model, ids, labels):
    with torch.no_grad():
        return F.cross_entropy(dense_logits(model, ids, labels), targets(labels), reduction="none")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "granite"])
def test_losses_are_those_of_the_first_weights(kind):
    model = family_model(kind).double()
    base = copy.deepcopy(model)
    scores = StartScores(model, run_of(model).start)
    ids, labels = labelled()
    take_steps(model, 3)
    assert (truth(model, ids, labels) - truth(base, ids, labels)).abs().max() > 1e-2
    torch.testing.assert_close(scores.losses({"input_ids": ids}, labels), truth(base, ids, labels))


def test_lora_starts_from_the_model_without_adapters():
    base = family_model("llama")
    model = LoRA(r=3).prepare_model(family_model("llama"), Run(directory=None))
    scores = StartScores(model, run_of(model).start)
    ids, labels = labelled()
    take_steps(model, 3)
    torch.testing.assert_close(
        scores.losses({"input_ids": ids}, labels), truth(base, ids, labels), rtol=1e-4, atol=1e-4
    )


def test_half_precision_weights_beside_frozen_ones():
    model = family_model("llama").bfloat16()
    for p in params.decoder_layers(model)[0].parameters():
        p.requires_grad_(False)
    scores = StartScores(model, run_of(model).start)
    ids, labels = labelled()
    found = scores.losses({"input_ids": ids}, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth(model, ids, labels).float(), rtol=0.1, atol=0.1)


class Counted:
    """Counts forward passes."""

    def __init__(self, model):
        self.passes = 0
        params.causal(model).base_model.register_forward_hook(self.count)

    def count(self, module, args, output):
        self.passes += 1


def test_kept_rows_are_known_shuffled_and_padded_anew():
    model = family_model("llama").double()
    scores = StartScores(model, run_of(model).start)
    ids, labels = labelled(6)
    wanted = truth(model, ids, labels)
    owner = sequences({}, labels)[:, 1:][labels[:, 1:] != -100]
    found = scores.keep([({"input_ids": ids[:4]}, labels[:4]), ({"input_ids": ids[4:]}, labels[4:])])
    assert [len(losses) for losses in found] == torch.bincount(owner).tolist()
    torch.testing.assert_close(torch.cat(found), wanted)
    counted = Counted(model)
    order = torch.tensor([5, 0, 3])
    for left, right in ((0, 0), (2, 3)):
        inputs = {
            "input_ids": F.pad(ids[order], (left, right), value=7),
            "attention_mask": F.pad(torch.ones_like(ids[order]), (left, right)),
        }
        again = scores.losses(inputs, F.pad(labels[order], (left, right), value=-100))
        torch.testing.assert_close(again, torch.cat([wanted[owner == row] for row in order]))
    assert counted.passes == 0


def test_a_row_that_is_not_kept_is_asked_for():
    model = family_model("llama").double()
    scores = StartScores(model, run_of(model).start)
    ids, labels = labelled(3)
    scores.keep([({"input_ids": ids}, labels)])
    counted = Counted(model)
    other, more = labelled(3, seed=1)
    torch.testing.assert_close(scores.losses({"input_ids": other}, more), truth(model, other, more))
    fewer = labels.clone()
    fewer[:, :5] = -100  # the same tokens, another prompt
    torch.testing.assert_close(scores.losses({"input_ids": ids}, fewer), truth(model, ids, fewer))
    assert counted.passes == 4  # two of them are the truth's


def test_packed_rows_are_told_apart_by_their_positions():
    model = family_model("llama").double()
    scores = StartScores(model, run_of(model).start)
    ids, labels = labelled(3)
    labels[1] = ids[1]  # plain text: its first token has a label too, which a flattened batch leaves out
    scores.keep([({"input_ids": ids}, labels)])
    wanted = truth(model, ids, labels)
    labels[:, 0] = -100
    counted = Counted(model)
    flat = {"input_ids": ids.flatten()[None], "position_ids": torch.arange(9).repeat(3)[None]}
    assert torch.equal(sequences(flat, labels.flatten()[None]), torch.arange(3).repeat_interleave(9)[None])
    torch.testing.assert_close(scores.losses(flat, labels.flatten()[None]), wanted)
    assert counted.passes == 0


def test_leaves_the_model_as_it_was():
    model = LoRA(r=3).prepare_model(family_model("llama"), Run(directory=None)).train()
    scores = StartScores(model, run_of(model).start)
    before = {name: (p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    ids, labels = labelled()
    assert not scores.losses({"input_ids": ids}, labels).requires_grad
    assert {name: (p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())
