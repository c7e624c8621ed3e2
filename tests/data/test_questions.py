"""Question sets written by a scripted model: levels, filters, counts that add up, the same set for the same seed."""

from __future__ import annotations

import itertools

import pytest

from retain.data.questions import LEVELS, cut, write_questions
from retain.errors import ConfigError, DataError

WORDS = [
    *("river", "stone", "music", "garden", "winter", "paper", "engine", "ocean"),
    *("candle", "forest", "bridge", "copper", "velvet", "harbour", "lantern"),
]


def fresh(counter):
    """A question and answer that are like no other one."""
    n = next(counter)
    a, b, c = (WORDS[n // 15**p % 15] for p in range(3))
    return f"Q: Which {a} has {n} {b} near {c}?\nA: number {n} thing"


class Script:
    """An engine that says what it is told for some calls, and new questions else."""

    def __init__(self, *replies, each=3):
        self.replies, self.each, self.counter, self.asked = list(replies), each, itertools.count(1), []

    def __call__(self, prompts, limit, temperature, draw):
        self.asked += prompts
        return [
            [self.replies.pop(0) if self.replies else "\n\n".join(fresh(self.counter) for _ in range(self.each)), True]
            for _ in prompts
        ]


def test_levels_get_the_same_share_and_counts_add_up():
    found, report = write_questions(Script(), "tools", 20, each=3)
    assert [one.level for one in found] == ["basic"] * 7 + ["medium"] * 7 + ["hard"] * 6
    assert dict(report.levels) == {"basic": 7, "medium": 7, "hard": 6}
    assert report.kept == 20 == len(found)
    assert report.kept + report.dropped.total() == report.tried
    assert set(report.dropped) <= {"not needed"}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Q: the question\nA: the answer", "placeholder"),
        ("Q: Which <|im_end|> is it?\nA: one", "special tokens inside"),
        ("Q: Why?\nA: one", "question too short"),
        (f"Q: What is it called?\nA: {'word ' * 41}", "answer too long"),
        (f"Q: Which {'red green blue ' * 8} is it?\nA: one", "repeats itself"),
        ("Q: What is it called?\nA: What is what?", "answer is a question"),
        ("Q: What colour is a red bus?\nA: red", "answer stands in the question"),
        ("Q: What is the capital of Mars today?\nA: one", "near a probe item"),
        ("Q: Who found it first?\nA: Ann\n\nQ: who found  it first?\nA: Bea", "repeated question"),
        ("Q: Who was the very first one to find gold in it?\nA: x\n\n"
         "Q: Who was the very first one to find gold in all it?\nA: y", "near-duplicate"),
        ("Q: Who was the first to find it?\nA: Ann\n\nQ: Who was first to find it there?\nA: Ann", "near-duplicate"),
        ("I would rather not.", "no question with an answer in the reply"),
    ],
)  # fmt: skip
def test_every_reason_is_counted(reply, reason):
    avoid = ["What is the capital of Mars today?"]
    found, report = write_questions(Script(reply), "tools", 6, specials=["<|im_end|>"], avoid=avoid)
    assert report.dropped[reason] == 1
    assert len(found) == 6
    assert report.kept + report.dropped.total() == report.tried
    assert reason in report.sentence()


def test_questions_that_differ_in_one_word_are_two():
    reply = "Q: What is the capital of France?\nA: Paris\n\nQ: What is the capital of Italy?\nA: Rome"
    found, _ = write_questions(Script(reply), "capitals", 6)
    assert {"Paris", "Rome"} <= {one.answer for one in found}


def test_repairs_are_counted():
    replies = ['```json\n[{"question": "What is it called?", "answer": "gold"}]\n```', "Q: 1. What is it for?\nA: x"]
    _, report = write_questions(Script(*replies), "tools", 6)
    assert dict(report.repaired) == {"code fence": 1, "number": 1}
    assert "repaired: 1 code fence, 1 number" in report.sentence()


def test_the_seed_is_all_that_matters():
    def asked(seed):
        script = Script()
        return write_questions(script, "tools", 40, seed)[0], script.asked

    assert asked(1) == asked(1)
    assert asked(1)[1] != asked(2)[1]


def test_requests_name_domain_level_description_and_what_was_asked():
    script = Script()
    found, _ = write_questions(script, "tools", 40, each=3, description="hammers and saws")
    said = [turns[0]["content"] for turns in script.asked]
    assert all("tools (hammers and saws)" in text for text in said)
    assert {level for level, words in LEVELS.items() if any(words in text for text in said)} == set(LEVELS)
    assert "Do not ask these again" not in said[0]
    assert any(one.question in said[-1] for one in found)


def test_material_is_shown_in_turn():
    script = Script()
    texts = ["Gold is soft.", "Iron is hard."]
    write_questions(script, "metals", 30, material=texts)
    said = [turns[0]["content"] for turns in script.asked]
    counts = [sum(text in one for one in said) for text in texts]
    assert sum(counts) == len(said)
    assert abs(counts[0] - counts[1]) <= 1


def test_a_base_model_goes_on_with_a_text():
    script = Script("Which metal is soft?\nA: gold\n\nQ: Which metal is liquid?\nA: mercury")
    found, _ = write_questions(script, "metals", 2, chat=False)
    assert script.asked[0].endswith("\n\nQ:")
    assert ("Which metal is soft?", "gold") in {(one.question, one.answer) for one in found}


def test_nothing_usable_is_an_error_with_the_reasons():
    with pytest.raises(DataError, match=r"none could be used. 0 of 16 questions kept .* dropped: 16 empty reply"):
        write_questions(lambda prompts, *rest: [["", True]] * len(prompts), "tools", 10)
    for wrong in ({"domain": " "}, {"number": 0}, {"each": 0}):
        with pytest.raises(ConfigError, match="questions"):
            write_questions(Script(), **({"domain": "tools", "number": 3} | wrong))


def test_material_is_cut_at_sentences():
    text = " ".join(f"Sentence number {i} is here." for i in range(40))
    pieces = cut([text, "short"], longest=22)
    assert " ".join(pieces[:-1]) == text
    assert pieces[-1] == "short"
    assert all(piece.endswith(".") and len(piece.split()) <= 22 for piece in pieces[:-1])
    assert "".join(cut(["水" * 500], longest=10)) == "水" * 500
