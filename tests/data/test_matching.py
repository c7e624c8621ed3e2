"""Answers compared word by word: the tricky ones."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest

from retain.data.matching import contains, exact_match, token_f1, words

FOUND = [
    ("7", "The answer is 7."),
    ("7", "7"),
    ("7", "It is 7.0, exactly."),
    ("7", "共7个"),
    ("7", "(7)"),
    ("7", "**7**"),
    ("7", "７"),  # full width
    ("7", "7!"),
    ("7", "7, I think"),
    ("-5", "x = -5"),
    ("-5", "x = −5"),
    ("5", "2-5"),
    ("1000", "1,000 people"),
    ("1,000", "1000"),
    ("7.5", "7.50 metres"),
    ("3/4", "It is 3/4."),
    ("7:30", "At 7:30 sharp"),
    ("50", "50%"),
    ("twenty-one", "Twenty one"),
    ("St. John's", "The capital is St. John’s."),
    ("St. John’s", "st johns"),
    ("Bogotá", "bogota"),
    ("Bogota", "It is BOGOTÁ."),
    ("Zürich", "zu\u0308rich"),  # a combining mark
    ("France", "France's capital"),
    ("the Nile", "It is Nile"),
    ("U.S.A.", "the USA"),
    ("Washington, D.C.", "Washington DC"),
    ("Straße", "STRASSE"),
    ("北京", "中国的首都是北京。"),
    ("東京", "東京です"),
    ("파리", "수도는 파리는"),
    ("Москва", "москва!"),
    ("H2O", "h₂o"),
    ("Na", "Na (sodium)"),
    ("New York", "New  York"),
    ("A", "a."),
    ("+", "1 + 1"),
    ("हिन्दी", "यह हिन्दी है"),
]
NOT_FOUND = [
    ("7", "72"),
    ("7", "17"),
    ("7", "7.5"),
    ("7", "0.7"),
    ("7", "1,007"),
    ("7", "7/8"),
    ("7", "7th"),
    ("7", "-7"),
    ("7", "共72个"),
    ("7", "version v1.7"),
    ("5", "-5"),
    ("-5", "5"),
    ("2", "H2O"),
    ("Na", "Nation"),
    ("Rome", "Romeo"),
    ("Rome", "Chrome"),
    ("New York", "York New"),
    ("New York", "New and York"),
    ("北京", "北方的京城"),
    ("か", "が"),
    ("и", "й"),
    ("A", "This is a cat"),
    ("Paris", ""),
    ("", "Paris"),
    (" ", " "),
    ("+", "1 and 1"),
    ("हिन्द", "यह हिन्दी है"),
]


@pytest.mark.parametrize(("accepted", "text"), FOUND)
def test_found(accepted, text):
    assert contains(text, accepted)


@pytest.mark.parametrize(("accepted", "text"), NOT_FOUND)
def test_not_found(accepted, text):
    assert not contains(text, accepted)


def squad_words(text):
    """The published normalisation for plain English, written down on its own."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(text, accepted):
    given, wanted = squad_words(text), squad_words(accepted)
    same = sum((Counter(given) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("It is the big red house, the old one.", "a red house"),
        ("red red blue", "red blue blue"),
        ("nothing", "something else"),
        ("", "word"),
        ("John's dog", "Johns dog!"),
    ],
)
def test_exact_match_and_f1_equal_squad_on_plain_english(text, accepted):
    assert exact_match(text, accepted) == (squad_words(text) == squad_words(accepted))
    assert token_f1(text, accepted) == pytest.approx(squad_f1(text, accepted))


def test_f1_of_unspaced_scripts_is_by_character():
    assert words("北京，中国") == ["北", "京", "中", "国"]
    assert token_f1("北京市", "北京") == pytest.approx(0.8)


def test_numbers_keep_their_value():
    assert words("1,234.50 and 1e3 and 007 and 0.0") == ["1234.5", "and", "1e3", "and", "7", "and", "0"]
