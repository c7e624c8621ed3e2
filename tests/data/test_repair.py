"""What a model writes as questions and answers: every malformed form is repaired where that is sure, else counted."""

import json

import pytest

from retain.data.repair import pairs

ONE = [("What is it?", "a cell")]
TWO = [*ONE, ("Who was it?", "Ann")]
ENTRY = '{"question": "What is it?", "answer": "a cell"}'
OTHER = '{"question": "Who was it?", "answer": "Ann"}'


@pytest.mark.parametrize(
    ("text", "found", "repaired", "dropped"),
    [
        (f"[{ENTRY}, {OTHER}]", TWO, {}, {}),
        (f"{ENTRY}\n{OTHER}", TWO, {}, {}),
        (json.dumps({"qa": [json.loads(ENTRY)]}), ONE, {}, {}),
        ('{"questions": ["What is it?", "Who was it?"], "answers": ["a cell", "Ann"]}', TWO, {}, {}),
        ('[["What is it?", "a cell"]]', ONE, {}, {}),
        ('[{"Q": "What is it?", "A": "a cell"}]', ONE, {}, {}),
        ('[{"question": "How many?", "answer": 3}]', [("How many?", "3")], {}, {}),
        (f"```json\n[{ENTRY}]\n```", ONE, {"code fence": 1}, {}),
        (f"```\n[{ENTRY}]", ONE, {"code fence": 1}, {}),
        ("Q: What is it?\nA: a cell\n\n```\nprint(1)\n```", ONE, {"code fence": 1}, {}),
        (f"Sure!\n[{ENTRY}]", ONE, {"text around JSON": 1}, {}),
        (f"[{ENTRY}]\nIs that enough?", ONE, {"text around JSON": 1}, {}),
        (f"[{ENTRY}, {OTHER},]", TWO, {}, {}),
        (f"[{ENTRY[:-1]},}}]", ONE, {"comma": 1}, {}),
        ("[{'question': 'What is it?', 'answer': 'a cell'}]", ONE, {"Python quotes": 1}, {}),
        ("[{“question”: “What is it?”, “answer”: “a cell”}]", ONE, {"typographic quotes": 1}, {}),
        ('[{"question": "What is\nit?", "answer": "a cell"}]', ONE, {"line break in a text": 1}, {}),
        (f"[{ENTRY}, {OTHER[:30]}", ONE, {"cut-off list": 1}, {"cut-off entry": 1}),
        (f"[{ENTRY}, {OTHER}", TWO, {"cut-off list": 1}, {}),
        (f'[{ENTRY}, {{"question": "a?" "answer": "b"}}]', ONE, {}, {"broken JSON entry": 1}),
        ('[{"question": "What is it?"}]', [], {}, {"question without an answer": 1}),
        ('[{"answer": "Ann"}]', [], {}, {"entry without a question": 1}),
        ('[{"question": "", "answer": "Ann"}]', [], {}, {"empty question": 1}),
        ('[{"question": "Who?", "answer": " "}]', [], {}, {"empty answer": 1}),
        ('{"questions": ["a?", "b?"], "answers": ["1"]}', [], {}, {"as many answers as questions are needed": 2}),
        ("Q: What is it?\nA: a cell\n\nQ: Who was it?\nA: Ann", TWO, {}, {}),
        ("1. Q: What is it?\n   A: a cell\n2. Q: Who was it?\n   A: Ann", TWO, {}, {}),
        ("**Question 1:** What is it?\n**Answer 1:** a cell", ONE, {}, {}),
        ("Question: What\nis it?\nAnswer: a\ncell\n\nThat was it.", ONE, {}, {}),
        ("Q: 1. What is it?\nA: a cell", ONE, {"number": 1}, {}),
        ("Q: Question: What is it?\nA: The answer: a cell", ONE, {"mark written twice": 2}, {}),
        ('Q: "What is it?"\nA: “a cell”', ONE, {"quotes": 2}, {}),
        ("Q: What is it?\nA: **a cell**", ONE, {"markup": 1}, {}),
        ("1. What is it? - a cell\n2) Who was it? Answer: Ann", TWO, {"answer on the line of its question": 2}, {}),
        ("Q: What is it?\nA: a cell\nQ: Who was it?", ONE, {}, {"question without an answer": 1}),
        ("A: Ann\nQ: What is it?\nA: a cell", ONE, {}, {"answer without a question": 1}),
        ("Q: What is it?\nA: a cell\nA: a wall", ONE, {}, {"second answer": 1}),
        ("Q: What is it?\nA) a cell\nB) a wall\nAnswer: A", [], {}, {"multiple choice": 1}),
        ("1. What is it?\n2. Who was it?", [], {}, {"no question with an answer in the reply": 1}),
        ("I cannot do that.", [], {}, {"no question with an answer in the reply": 1}),
        ("", [], {}, {"empty reply": 1}),
    ],
)
def test_forms(text, found, repaired, dropped):
    written = pairs(text)
    assert (written.pairs, dict(written.repaired), dict(written.dropped)) == (found, repaired, dropped)


def test_the_last_answer_of_a_reply_that_was_stopped_is_not_trusted():
    text = "Q: What is it?\nA: a cell\n\nQ: Who was it?\nA: An"
    assert pairs(text).pairs[1] == ("Who was it?", "An")
    written = pairs(text, finished=False)
    assert (written.pairs, dict(written.dropped)) == (ONE, {"cut-off answer": 1})
    assert pairs("Q: What is it?\nA: a cell\n\nQ: Who", finished=False).pairs == ONE
    assert pairs(f"[{ENTRY}, {OTHER}", finished=False).pairs == TWO, "a whole entry is whole"


@pytest.mark.parametrize("answer", ["3.14", "1. FC Köln", "10:30", 'the "Titanic"', "2 * 3 * 4", "x_1", "C#"])
def test_what_belongs_to_an_answer_stays(answer):
    for text in (f"Q: Which one is it?\nA: {answer}", json.dumps([{"question": "Which one is it?", "answer": answer}])):
        assert pairs(text).pairs == [("Which one is it?", answer)]


def test_any_cut_of_a_list_gives_its_whole_entries():
    whole = f"[{ENTRY}, {OTHER}]"
    for end in range(len(whole)):
        found = pairs(whole[:end]).pairs
        assert found == TWO[: whole[:end].count("}")]
