"""Perplexity of texts."""

from __future__ import annotations

import math

import pytest
import torch

from retain.probes.base import Item, Subject
from retain.probes.perplexity import Perplexity

TEXTS = ["The heart pumps blood through the body.", "七只小船", "Rome"]


def test_score_is_the_summed_surprise(model, tokenizer):
    probe = Perplexity("test", [Item(str(i), {"text": text}) for i, text in enumerate(TEXTS)])
    outcomes = probe.look(Subject(model, tokenizer))
    for text, outcome in zip(TEXTS, outcomes):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            mean = model(ids, labels=ids).loss.item()
        assert outcome.tokens == ids.shape[1] - 1
        assert outcome.score == pytest.approx(mean * outcome.tokens, rel=1e-5)
        assert outcome.details["bits_per_byte"] == pytest.approx(outcome.score / math.log(2) / len(text.encode()))
        assert outcome.correct is None
    assert probe.higher_is_better is False
    assert probe.chance is None


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model, tokenizer):
    model.lm_head.weight.data.zero_()
    outcome = Perplexity("test", [Item("0", {"text": TEXTS[0]})]).look(Subject(model, tokenizer))[0]
    assert math.exp(outcome.score / outcome.tokens) == pytest.approx(len(tokenizer), rel=1e-5)


def test_windows_are_an_option(model, tokenizer):
    text = TEXTS[0] * 4
    one = Perplexity("test", [Item("0", {"text": text})]).look(Subject(model, tokenizer))[0]
    many = Perplexity("test", [Item("0", {"text": text})], window=8, stride=4).look(Subject(model, tokenizer))[0]
    assert one.details["windows"] == 1
    assert many.details["windows"] == 1 + math.ceil((many.tokens - 8) / 4)
    assert one.score != many.score
