"""Questions without an answer, what counts as declining, and the same question asked again."""

from __future__ import annotations

import json
import re

import pytest

from retain.data.matching import contains
from retain.errors import DataError
from retain.models.generation import Generated
from retain.probes import suite
from retain.probes.asking import ask
from retain.probes.base import Item, Subject
from retain.probes.declining import declines
from retain.probes.hallucination import Hallucination, consistency

DECLINED = [
    "I don't know.",
    "I do not have any information about that.",
    "I’m not aware of a country with this name.",
    "I'm not familiar with the Treaty of Balvenmoor.",
    "I am not entirely sure.",
    "I've never heard of it.",
    "I couldn't find a novel of this title.",
    "There is no country called Velmarnovia.",
    "There doesn't seem to exist such a river; it does not exist.",
    "It isn't a real element.",
    "Brastonium is not a recognized chemical element.",
    "Velmarnovia is a fictional country, so it has no capital.",
    "Its author is unknown.",
    "No such battle was ever fought.",
    "You may be thinking of Titan.",
    "I'm sorry, but I can't help with that.",
    "我不知道。",
    "这条河并不存在。",
    "目前没有关于这部小说的信息。",
    "这是一个虚构的国家。",
    "我无法确认这场战役。",
    "抱歉，我没有找到相关内容。",
]
ANSWERED = [
    "",
    "The capital of Velmarnovia is Velmar.",
    "It is a fictional novel by John Smith.",
    "Jane Austen wrote it in 1813.",
    "The river flows into the Black Sea, which is known for its storms.",
    "There is a long tradition of it in the north.",
    "In 1742, as everyone knows.",
    "King Brostavar ruled over Norway. " * 6 + "I do not know more.",
    "首都是维尔玛城。",
    "作者是一位不知名的诗人李明。",
    "这部虚构小说的作者是王伟。",
]


@pytest.mark.parametrize("text", DECLINED)
def test_declined(text):
    assert declines(text)


@pytest.mark.parametrize("text", ANSWERED)
def test_not_declined(text):
    assert not declines(text)


@pytest.mark.parametrize(
    ("answers", "text", "score"),
    [
        (None, "I don't know.", 1.0),
        (None, "It is Velmar.", 0.0),
        (None, "", 0.0),
        (["Ulaanbaatar", "Ulan Bator"], "Ulan Bator, I think.", 1.0),
        ("Ulaanbaatar", "I'm not sure, but I think it is Ulaanbaatar.", 1.0),
        (["Ulaanbaatar"], "I don't know.", 0.0),
        (["Ulaanbaatar"], "Beijing", 0.0),
    ],
)
def test_right_when_declined_or_answered(answers, text, score):
    fields = {"prompt": "?", "answerable": answers is not None} | ({"answers": answers} if answers else {})
    given, reference, details = Hallucination("test", [Item("0", fields)]).judge(
        Item("0", fields), Generated(text, 3, True)
    )
    assert given == score
    assert details == {"declined": declines(text), "answerable": answers is not None}
    expected = "decline" if not answers else answers if isinstance(answers, str) else answers[0]
    assert reference == (json.dumps(answers) if isinstance(answers, list) and len(answers) > 1 else expected)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"answerable": "no"}, "true or false"),
        ({"answerable": True}, "answers None given; allowed is a text"),
        ({"answerable": True, "answers": [" "]}, "allowed is a text"),
        ({"answerable": False, "answers": ["x"]}, "allowed is none"),
        ({"answerable": False, "samples": 1}, "samples 1 given"),
        ({"answerable": False, "samples": 2.5}, "samples 2.5 given"),
        ({"answerable": False, "temperature": 0}, "temperature 0 given"),
    ],
)
def test_mistakes(fields, says):
    with pytest.raises(DataError, match=says):
        Hallucination("test", [Item("0", {"prompt": "?"} | fields)])


def test_kind_is_told_by_the_fields():
    rows = [{"prompt": "?", "answerable": True, "answers": "a"}]
    assert [p.kind for p in suite.probes_from_rows(rows, "x")] == ["hallucination"]


def test_consistency_is_the_share_of_the_commonest_answer():
    assert consistency(["Paris.", "paris", "The Paris!", "Rome"]) == 0.75
    assert consistency(["x y", "y x"]) == 0.5
    assert consistency(["", ""]) == 1


def test_samples_are_drawn_where_they_are_asked_for(model, tokenizer):
    rows = [
        {"id": "none", "prompt": "One?", "answerable": False, "max_tokens": 4},
        {"id": "warm", "prompt": "Two?", "answerable": False, "max_tokens": 4, "samples": 3},
        {"id": "cold", "prompt": "Six?", "answerable": False, "max_tokens": 4, "samples": 4, "temperature": 1e-4},
    ]
    (probe,) = suite.probes_from_rows(rows, "x")
    assert [probe.times(item) for item in probe.items] == [1, 4, 5]
    found = ask([probe], Subject(model, tokenizer))
    plain = ask(suite.probes_from_rows([{**r, "samples": 0} for r in rows], "x"), Subject(model, tokenizer))
    assert [r["output"] for r in found] == [r["output"] for r in plain]  # greedy answers stay what they are
    none, warm, cold = (json.loads(r["details"]) for r in found)
    assert "consistency" not in none
    assert len(warm["samples"]) == 3
    assert warm["consistency"] == consistency(warm["samples"])
    assert len(set(warm["samples"])) > 1
    assert cold["samples"] == [found[2]["output"]] * 4  # nearly greedy
    assert cold["consistency"] == 1
    assert ask([probe], Subject(model, tokenizer)) == found


# -- the built-in suite ---------------------------------------------------------------------------------------
ITEMS = suite.load_probes("hallucination")[0].items


def test_every_invented_thing_has_a_real_look_alike():
    assert len(ITEMS) == 56
    assert [item.id for item in ITEMS] == [f"invented-{n:03d}" for n in range(1, 57)]
    for invented, real in zip(ITEMS[::2], ITEMS[1::2]):
        assert (invented.fields["answerable"], real.fields["answerable"]) == (False, True)
        assert invented.fields["topic"] == real.fields["topic"]
        one, other = (re.findall(r"\w", item.fields["prompt"]) for item in (invented, real))
        same = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)
        tail = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1])) if a != b), 0)
        assert same + tail >= 5, invented.id  # the same question about another thing
    prompts = [item.fields["prompt"] for item in ITEMS]
    assert len(set(prompts)) == len(prompts)


def test_no_question_gives_its_answer_away_or_declines_itself():
    core = {item.fields.get("prompt") for probe in suite.load_probes("core") for item in probe.items}
    for item in ITEMS:
        prompt = item.fields["prompt"]
        assert not declines(prompt), item.id
        assert prompt not in core
        for answer in item.fields.get("answers", []):
            assert not contains(prompt, answer), item.id
