"""What the base said: the divergence from it against dense KL in float64, and what is read back from a file."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from retain.errors import RunError
from retain.models import base_outputs
from retain.models.base_outputs import Context

TEXTS = ["The heart pumps blood through the body.", "Rome", "七只小船 sailed over the cold northern sea to find land."]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def changed(base):
    """The base with weights moved a little, so that divergences are small but not nothing."""
    model, random = copy.deepcopy(base), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random) * parameter.abs().mean()
    return model


@pytest.fixture(scope="module")
def contexts(tokenizer):
    """Three of different lengths; of the last only what comes after six tokens is predicted."""
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in TEXTS]
    return [Context(ids[0], 1), Context(ids[1], 1), Context(ids[2], 6)]


def dense(base, model, context):
    """KL(p⁰‖p) at every predicted position from all logits, in float64; and the base's log-probabilities."""
    rows = []
    for one in (base, model):
        wide = copy.deepcopy(one).double()
        with torch.no_grad():
            logits = wide(input_ids=torch.tensor([context.tokens])).logits[0, context.first - 1 : -1]
        rows.append(torch.log_softmax(logits, dim=-1))
    return (rows[0].exp() * (rows[0] - rows[1])).sum(-1), rows


def gaps(model, tokenizer, said, **options):
    found = dict(base_outputs.compare(model, tokenizer, said, **options))
    return [found[i] for i in range(len(said))]


def test_the_whole_vocabulary_gives_the_dense_kl(base, changed, tokenizer, contexts):
    said = base_outputs.say(base, tokenizer, contexts, k=10**6)
    for context, one, gap in zip(contexts, said, gaps(changed, tokenizer, said)):
        expected, (p0, p) = dense(base, changed, context)
        assert one.ids.shape == (len(context.tokens) - context.first, len(tokenizer))
        assert gap.exact
        assert gap.nats == pytest.approx(float(expected.sum()), rel=1e-4)
        assert gap.largest == pytest.approx(float(expected.max()), rel=1e-4)
        assert gap.same == pytest.approx(float((p0.argmax(-1) == p.argmax(-1)).double().mean()))


def test_a_list_is_a_lower_bound_by_what_the_chain_rule_says(base, changed, tokenizer, contexts):
    before = 0.0
    for k in (1, 8, 64, len(tokenizer) - 1):
        said = base_outputs.say(base, tokenizer, contexts, k)
        for context, one, gap in zip(contexts, said, gaps(changed, tokenizer, said)):
            expected, (p0, p) = dense(base, changed, context)
            inside = torch.zeros_like(p0, dtype=torch.bool).scatter_(1, one.ids.long(), True)
            mass, other = (x.exp().masked_fill(inside, 0).sum(-1, keepdim=True) for x in (p0, p))
            tail = (p0.exp() * ((p0 - mass.log()) - (p - other.log()))).masked_fill(inside, 0).sum(-1)
            assert not gap.exact
            assert gap.nats <= float(expected.sum()) * (1 + 1e-6) + 1e-6  # log-probabilities are float32
            assert gap.nats == pytest.approx(float((expected - tail).sum()), rel=1e-3, abs=1e-5)
            assert one.tail == pytest.approx(float(mass.mean()), rel=1e-4, abs=1e-6)
        total = sum(gap.nats for gap in gaps(changed, tokenizer, said))
        assert total >= before - 1e-6  # more tokens, a tighter bound
        before = total
    assert before > 0.01


@pytest.mark.parametrize("k", [1, 16, 10**6])
def test_the_base_is_at_no_distance_from_itself(base, tokenizer, contexts, k):
    said = base_outputs.say(base, tokenizer, contexts, k)
    for gap in gaps(base, tokenizer, said):
        assert (gap.nats, gap.largest, gap.same) == (0, 0, 1)
    for gap in gaps(base, tokenizer, said, batch_tokens=8):  # other batches, other rounding
        assert gap.nats < 1e-6


def test_the_model_is_left_as_it_was(base, tokenizer, contexts):
    base.train()
    gaps(base, tokenizer, base_outputs.say(base, tokenizer, contexts, 4))
    assert base.training
    base.eval()


def test_what_is_read_is_what_was_written(base, tokenizer, contexts, tmp_path):
    said = base_outputs.say(base, tokenizer, contexts, 16)
    path = tmp_path / "a" / "said.safetensors"
    base_outputs.save(dict(zip("abc", said)), path)
    read = base_outputs.load(path)
    assert list(read) == ["a", "b", "c"]
    for one, other in zip(said, read.values()):
        assert one.context == other.context
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.log_probs, other.log_probs)
    assert [p.name for p in path.parent.iterdir()] == ["said.safetensors"]
    positions = sum(len(c.tokens) - c.first for c in contexts)
    assert path.stat().st_size < positions * 16 * 8 + 1500


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "said.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(RunError, match=r"said\.safetensors: damaged .*Delete it"):
        base_outputs.load(path)
