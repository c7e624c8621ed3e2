"""Question answering: what counts as right."""

from __future__ import annotations

import pytest

from retain.errors import DataError
from retain.models.generation import Generated
from retain.probes.answer import Answer
from retain.probes.base import Item


def judge(text, answers):
    item = Item("0", {"prompt": "?", "answers": answers})
    return Answer("test", [item]).judge(item, Generated(text, 3, True))


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("The answer is 7.", ["7", "seven"], 1.0),
        ("Seven.", ["7", "seven"], 1.0),
        ("72", ["7", "seven"], 0.0),
        ("It is St. John’s.", "St. John's", 1.0),
        ("", ["7"], 0.0),
    ],
)
def test_right_when_an_accepted_answer_is_there(text, answers, score):
    assert judge(text, answers)[0] == score


def test_details_take_the_best_of_the_accepted_answers():
    score, reference, details = judge("The Eiffel Tower", ["a tower", "Eiffel tower"])
    assert (score, reference) == (1.0, '["a tower", "Eiffel tower"]')
    assert details == {"exact_match": 1.0, "f1": 1.0}
    details = judge("the big tower", ["a tower"])[2]
    assert details == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize("answers", [[], "", ["a", " "], [7], 7, None])
def test_answers_that_nothing_can_match_are_an_error(answers):
    with pytest.raises(DataError, match="item '0'"):
        judge("x", answers)
