"""Rows as a model sees them, and what similarity makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from advice_kit import counting, travelling

from retain.advice.reading import ANSWER, BEFORE, Sample, built_in, read_sample
from retain.advice.similarity import measure, nearness
from retain.errors import DataError
from retain.models.generation import render


def sample(texts: list[str], name: str = "texts") -> Sample:
    return Sample(name, [[] for _ in texts], texts, len(texts))


def test_a_sample_is_fair_and_the_same_again(desk):
    first, again = (read_sample(str(desk / "counting.jsonl"), 10, seed=1) for _ in range(2))
    assert first == again
    assert (len(first), first.total) == (10, 40)
    assert set(first.texts) <= set(read_sample(str(desk / "counting.jsonl")).texts)
    assert first != read_sample(str(desk / "counting.jsonl"), 10, seed=2)


def test_losses_are_those_of_a_plain_pass(reader, model, tokenizer, desk):
    rows = read_sample(str(desk / "counting.jsonl"), 3)
    found = reader.losses(rows)
    for i, (nats, tokens) in enumerate(found):
        head = tokenizer(render(tokenizer, rows.turns[i]), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([head + tokenizer(rows.answers[i], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits.double().log_softmax(-1)[0, :-1]
        wanted = -logs.gather(1, ids[0, 1:, None])[len(head) - 1 :].sum()
        assert tokens == ids.shape[1] - len(head)
        assert nats == pytest.approx(float(wanted), rel=1e-4)


def test_long_rows_are_read_in_part(reader, tokenizer):
    long = Sample("long", [[{"role": "user", "content": "seven ships " * 300}]], ["the sea " * 300], 1)
    short = reader.short(long)
    assert len(tokenizer(short.turns[0][0]["content"])["input_ids"]) <= BEFORE + 1
    assert len(tokenizer(short.answers[0])["input_ids"]) <= ANSWER + 1
    brief = Sample("brief", [[{"role": "user", "content": "one"}]], ["two"], 1)
    assert reader.short(brief) == brief


def test_an_empty_answer_is_named(reader):
    with pytest.raises(DataError, match="row 2"):
        reader.losses(sample(["a", " "], "mine"))


def test_the_built_in_rows_have_right_answers():
    rows = built_in()
    answers = {question.splitlines()[0]: answer for question, answer in zip(rows.questions, rows.answers)}
    assert answers["Which organ pumps blood through the human body?"] == "The heart"
    assert all(f"- {answer}" in question.splitlines() for question, answer in zip(rows.questions, rows.answers))
    assert len(built_in(20)) == 20


def test_nearness_against_a_double_loop():
    rng = np.random.default_rng(0)
    general, new = rng.normal(size=(15, 4)) * [1, 5, 0.2, 3], rng.normal(size=(9, 4)) * 4
    scaled = [(x - general.mean(0)) / general.std(0) for x in (new, general)]

    def middle(rows, others, own):
        return np.median([min(math.dist(a, b) for j, b in enumerate(others) if not (own and i == j))
                          for i, a in enumerate(rows)])  # fmt: skip

    expected = middle(scaled[1], scaled[1], True) / middle(scaled[0], scaled[1], False)
    assert nearness(new, general) == pytest.approx(min(1.0, expected))
    assert nearness(general, general) == 1
    assert nearness(new + 1000, general) < 0.01


def test_a_direction_that_does_not_vary_does_not_count():
    general = np.random.default_rng(0).normal(size=(10, 3)) * [1, 1, 0]
    assert nearness(general + np.array([0, 0, 5]), general) == 1


def test_similarity_is_higher_for_rows_of_the_same_kind(reader, desk):
    general = read_sample(str(desk / "counting.jsonl"), 20)
    near = measure(reader, read_sample(str(desk / "more_counting.jsonl"), 20), general)
    far = measure(reader, read_sample(str(desk / "travelling.jsonl"), 20), general)
    assert 0 < far.by_embedding < near.by_embedding <= 1
    assert near.value == pytest.approx(math.sqrt(near.by_loss * near.by_embedding))
    assert near.by_loss == pytest.approx(min(1, math.exp(near.general_loss.value - near.loss.value)))
    assert f"{near.value:.2f}" in near.sentence()


def test_the_two_kinds_differ():
    assert not {row["prompt"] for row in counting(40)} & {row["prompt"] for row in travelling(40)}
