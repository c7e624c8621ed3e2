"""Divergence from the base: what its contexts are, what is kept, and when the base is asked."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model

from retain.errors import DataError
from retain.models.generation import generate, render
from retain.probes.asking import ask
from retain.probes.base import Item, Origin, Subject
from retain.probes.divergence import Divergence
from retain.probes.suite import load_probes, probes_from_rows

ROWS = [
    {"id": "text", "kind": "divergence", "text": "The heart pumps blood through the body."},
    {"id": "prompt", "kind": "divergence", "prompt": "What is the capital of Italy?"},
]


def probe(**options):
    return probes_from_rows(ROWS, "kl", **options)[0]


def never():
    raise AssertionError("the base was asked again")


@pytest.fixture(scope="module")
def other(tokenizer):
    return tiny_model(tokenizer, seed=1)


def kl(base, model, ids, first):
    p0, p = (
        torch.log_softmax(m(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1].double(), -1)
        for m in (base, model)
    )
    return float((p0.exp() * (p0 - p)).sum())


@torch.no_grad()
def test_contexts_are_the_text_and_what_the_base_wrote_to_the_prompt(model, other, tokenizer, tmp_path):
    asked = probe(top_k=1000, max_tokens=5)
    asked.look(Subject(model, tokenizer, origin=Origin(lambda: model, tmp_path)))
    text, prompt = asked.look(Subject(other, tokenizer, origin=Origin(never, tmp_path)))
    ids = [tokenizer.bos_token_id, *tokenizer.encode(ROWS[0]["text"])]
    assert (text.tokens, text.prompt, text.reference, text.correct) == (len(ids) - 1, ROWS[0]["text"], "", None)
    assert text.score == pytest.approx(kl(model, other, ids, 1), rel=1e-4)
    messages = [{"role": "user", "content": ROWS[1]["prompt"]}]
    (answer,) = generate(model, tokenizer, [messages], 5)
    shown = tokenizer.encode(render(tokenizer, messages), add_special_tokens=False)
    assert (prompt.tokens, prompt.reference) == (answer.tokens, answer.text)
    assert prompt.score == pytest.approx(kl(model, other, shown + answer.ids, len(shown)), rel=1e-4)
    assert text.details["exact"]
    assert text.details["tail"] == 0


def test_the_base_scores_zero_and_others_do_not(model, other, tokenizer, tmp_path):
    rows = ask([probe()], Subject(model, tokenizer, origin=Origin(lambda: model, tmp_path)))
    assert [row["score"] for row in rows] == [0, 0]
    assert all(json.loads(row["details"])["same_token"] == 1 for row in rows)
    later = ask([probe()], Subject(other, tokenizer, origin=Origin(never, tmp_path)))
    assert all(row["score"] / row["tokens"] > 0.1 for row in later)
    details = json.loads(later[0]["details"])
    assert not details["exact"]
    assert 0 < details["tail"] < 1
    assert details["largest"] >= later[0]["score"] / later[0]["tokens"]


def test_what_was_kept_serves_fewer_items_and_is_not_taken_for_others(model, other, tokenizer, tmp_path):
    base = Origin(lambda: model, tmp_path)
    both = probe().look(Subject(model, tokenizer, origin=base)) and probe().look(Subject(other, tokenizer, origin=base))
    (one,) = probe(limit=1).look(Subject(other, tokenizer, origin=Origin(never, tmp_path)))
    assert one.score == pytest.approx(next(o.score for o in both if o.item == one.item), rel=1e-5)
    with pytest.raises(AssertionError, match="asked again"):
        probe(top_k=7).look(Subject(other, tokenizer, origin=Origin(never, tmp_path)))
    changed = [ROWS[0], ROWS[1] | {"prompt": "What is the capital of France?"}]
    with pytest.raises(AssertionError, match="asked again"):
        probes_from_rows(changed, "kl")[0].look(Subject(other, tokenizer, origin=Origin(never, tmp_path)))


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_is_written_where_nothing_may_be(model, other, tokenizer, tmp_path, keep):
    origin = Origin(lambda: model, tmp_path / "base" if not keep else None, keep)
    scores = [o.score for o in probe().look(Subject(other, tokenizer, origin=origin))]
    assert list(tmp_path.iterdir()) == []
    kept = Origin(lambda: model, tmp_path / "base")
    assert scores == [o.score for o in probe().look(Subject(other, tokenizer, origin=kept))]
    assert len(list((tmp_path / "base").iterdir())) == 1


def test_a_long_text_is_cut_to_the_window(model, tokenizer):
    (one, _) = probe(window=4).look(Subject(model, tokenizer, origin=Origin(lambda: model)))
    assert one.tokens == 4


def test_a_model_without_a_base_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="directory of a run"):
        probe().look(Subject(model, tokenizer))


def test_rows_are_never_told_by_their_fields():
    assert [p.kind for p in probes_from_rows([{"text": "Rome is old."}], "a")] == ["perplexity"]
    with pytest.raises(DataError, match="Each kind needs") as error:
        probes_from_rows([{"prompt": "?"}], "a")
    assert "divergence" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "neither given"),
        ({"text": "a", "prompt": "b"}, "text, prompt given"),
        ({"text": " "}, "text given"),
        ({"text": "a", "top_k": 0}, None),
        ({"text": "a", "window": -1}, "window: -1"),
        ({"text": "a", "max_tokens": "many"}, "max_tokens: 'many'"),
    ],
)
def test_mistakes(fields, says):
    if says is None:  # 0 is "not given", as everywhere in probe files
        assert Divergence("kl", [Item("0", fields)]).items
        return
    with pytest.raises(DataError, match=says):
        Divergence("kl", [Item("0", fields)])


def test_items_share_one_size_of_list():
    items = [Item("0", {"text": "a", "top_k": 4}), Item("1", {"text": "b", "top_k": 8})]
    with pytest.raises(DataError, match=r"\[4, 8\] given; allowed is one number"):
        Divergence("kl", items)


def test_the_built_in_suite():
    (built_in,) = load_probes("divergence")
    assert (built_in.kind, built_in.name, built_in.group) == ("divergence", "divergence", "behaviour")
    prompts = [item.fields["prompt"] for item in built_in.items]
    assert len(set(prompts)) == len(prompts) == 24
