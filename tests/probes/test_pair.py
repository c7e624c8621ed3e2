"""Minimal pairs: the likelier text wins."""

from __future__ import annotations

import pytest
import torch

from retain.probes.base import Item, Subject
from retain.probes.pair import Pair

PAIRS = [
    ("The heart pumps blood.", "The heart pump blood."),
    ("Seven small ships sailed.", "Seven small ship sailed."),
    ("北京很大。", "北京大很。"),
]


def slow(model, tokenizer, text):
    tokens = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    with torch.no_grad():
        logp = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(logp[i, token].item() for i, token in enumerate(tokens[1:]))


def test_the_likelier_text_is_chosen(model, tokenizer):
    both = PAIRS + [(bad, good) for good, bad in PAIRS]
    probe = Pair("test", [Item(str(i), {"good": g, "bad": b}) for i, (g, b) in enumerate(both)])
    outcomes = probe.look(Subject(model, tokenizer))
    for (good, bad), outcome in zip(both, outcomes):
        a, b = slow(model, tokenizer, good), slow(model, tokenizer, bad)
        assert outcome.details["log_likelihoods"] == pytest.approx([a, b], abs=1e-3)
        assert outcome.score == float(a > b)
        assert outcome.output == (good if a > b else bad)
        assert outcome.reference == good
    assert sum(o.score for o in outcomes) == len(PAIRS)  # exactly one direction of each is right
    assert probe.chance == 0.5


def test_a_tie_is_wrong(model, tokenizer):
    probe = Pair("test", [Item("0", {"good": "The same.", "bad": "The same."})])
    assert probe.look(Subject(model, tokenizer))[0].correct is False
