"""Multiple choice: layout, normalisation, and equality with lm-evaluation-harness."""

from __future__ import annotations

import math

import pytest

from retain.errors import DataError
from retain.models.likelihood import choice_log_likelihoods
from retain.probes.base import Item, Subject
from retain.probes.choice import Choice


def probe(*rows, **options):
    return Choice("test", [Item(str(i), row) for i, row in enumerate(rows)], **options)


ROW = {"prompt": "Which animal can fly?", "choices": ["the bird", "the heart of the northern sea", "x"], "answer": 0}


@pytest.mark.parametrize(
    ("row", "options", "prompt", "first"),
    [
        ({}, {}, "Question: Which animal can fly?\nAnswer:", " the bird"),
        ({"prompt": "The bird is in"}, {}, "The bird is in", " the bird"),
        ({"prompt": "The bird is in "}, {}, "The bird is in ", "the bird"),
        ({"prompt": "The bird is in"}, {"layout": "question"}, "Question: The bird is in\nAnswer:", " the bird"),
        ({"layout": "continue"}, {"layout": "question"}, "Which animal can fly?", " the bird"),
        ({"prompt": "首都是"}, {}, "首都是", "the bird"),
        ({"choices": [" the bird", "b"]}, {}, "Question: Which animal can fly?\nAnswer:", " the bird"),
        (
            {},
            {"layout": "chat"},
            "<|im_start|>user\nWhich animal can fly?<|im_end|>\n<|im_start|>assistant\n",
            "the bird",
        ),
    ],
)
def test_layout(row, options, prompt, first, model, tokenizer):
    outcome = probe(ROW | row, **options).look(Subject(model, tokenizer))[0]
    choices = [first] + [
        first[: len(first) - len(first.lstrip())] * (c[0] != " ") + c for c in (ROW | row)["choices"][1:]
    ]
    expected = choice_log_likelihoods(model, tokenizer, [prompt], [choices])[0]
    assert outcome.prompt == prompt
    assert outcome.details["log_likelihoods"] == pytest.approx(expected.log_likelihoods, abs=1e-5)


def test_chat_layout_without_chat_is_a_question(model, tokenizer):
    outcome = probe(ROW, layout="chat").look(Subject(model, tokenizer, chat=False))[0]
    assert outcome.prompt == "Question: Which animal can fly?\nAnswer:"


def scores(monkeypatch, given, tokens):
    """Replace the model by given log-likelihoods."""
    from retain.models.likelihood import ChoiceScores

    def fake(model, tokenizer, prompts, choices, *rest):
        return [ChoiceScores(given[bool(p)], tokens, [0, 0, 0]) for p in prompts]

    monkeypatch.setattr("retain.probes.choice.choice_log_likelihoods", fake)


@pytest.mark.parametrize(
    ("normalisation", "best"), [("raw", 2), ("tokens", 0), ("characters", 1), ("unconditional", 0)]
)
def test_normalisation(normalisation, best, monkeypatch):
    # per character −6/8, −10/29, −2/1; per token −1, −10/9, −2; minus alone +1, −1, 0
    scores(monkeypatch, {True: [-6.0, -10.0, -2.0], False: [-7.0, -9.0, -2.0]}, [6, 9, 1])
    outcome = probe(ROW, normalisation=normalisation).look(Subject(None, None))[0]
    assert outcome.details["chosen"] == best
    assert outcome.output == ROW["choices"][best]
    assert outcome.reference == "the bird"
    assert outcome.score == float(best == 0)
    assert outcome.correct is (best == 0)
    assert outcome.details["choices"] == 3
    row_wins = probe(ROW | {"normalisation": normalisation}, normalisation="raw").look(Subject(None, None))[0]
    assert row_wins.details["chosen"] == best


def test_default_normalisation_is_acc_norm(monkeypatch):
    scores(monkeypatch, {True: [-6.0, -10.0, -2.0]}, [6, 9, 1])
    assert probe(ROW).look(Subject(None, None))[0].details["chosen"] == 1


def test_chance():
    two = ROW | {"choices": ["a", "b"]}
    assert probe(ROW, two).chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert probe().chance is None


@pytest.mark.parametrize(
    "change",
    [
        {"answer": 3},
        {"answer": -1},
        {"answer": "0"},
        {"answer": True},
        {"choices": ["a"]},
        {"choices": "ab"},
        {"choices": ["a", ""]},
        {"normalisation": "letters"},
        {"layout": "poem"},
    ],
)
def test_bad_rows_are_an_error(change):
    with pytest.raises(DataError, match="item '0'"):
        probe(ROW | change)


def test_accuracy_equals_lm_evaluation_harness(model, tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    rows = [
        ROW,
        {"prompt": "What does the heart pump?", "choices": ["blood", "air through the body", "sea"], "answer": 1},
        {"prompt": "Which city is the capital of Italy?", "choices": ["Paris", "Rome and Paris", "air"], "answer": 2},
    ]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    for name in ("characters", "raw", "unconditional"):
        for row, outcome in zip(rows, probe(*rows, normalisation=name).look(Subject(model, tokenizer))):
            context = f"Question: {row['prompt']}\nAnswer:"
            pairs = [(head, f" {c}") for head in (context, "") for c in row["choices"]]
            asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
            values = [value for value, _ in harness.loglikelihood(asked, disable_tqdm=True)]
            given, alone = values[:3], values[3:]
            expected = {
                "characters": [v / len(c) for v, c in zip(given, row["choices"])],
                "raw": given,
                "unconditional": [v - a for v, a in zip(given, alone)],
            }[name]
            assert outcome.details["log_likelihoods"] == pytest.approx(given, abs=1e-4)
            assert outcome.details["chosen"] == expected.index(max(expected))
            assert all(math.isfinite(v) for v in given)
