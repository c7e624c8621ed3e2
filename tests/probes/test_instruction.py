"""Constraints that a program can check: each one fulfilled and not."""

from __future__ import annotations

import json

import pytest

from retain.errors import DataError
from retain.models.generation import Generated
from retain.probes.base import Item
from retain.probes.instruction import (
    CHECKS,
    Instruction,
    count_sentences,
    count_words,
    detect_language,
    failed_checks,
)

# check, value, texts that fulfil it, texts that do not
CASES = [
    ("words_max", 3, ["one two three", "One - two", "well-known"], ["one two three four", "北京大学"]),
    ("words_min", 3, ["one two three", "北京大"], ["one two", "one - two"]),
    ("words_exactly", 2, ["Hello, world!", "北京"], ["Hello", "Hello big world"]),
    ("sentences_exactly", 2, ["One. Two!", "你好。再见！", "First one\nSecond one"], ["One.", "One. Two. Three."]),
    ("lines_exactly", 2, ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc"]),
    ("includes", ["river", "Sea"], ["The sea meets the River."], ["The rivers and the sea.", "river"]),
    ("includes", "你好", ["他说你好吗"], ["他说"]),
    ("includes", "<<end>>", ["text <<end>>"], ["end"]),
    ("excludes", ["the"], ["there, other"], ["in The sea"]),
    ("starts_with", "Dear friend", ["Dear friend, hello", '"dear Friend"'], ["My Dear friend"]),
    ("ends_with", "?", ["Is it?", 'He asks "why?"'], ["It is.", "Why? Because."]),
    ("lowercase", True, ["all small, 7"], ["One big", "123"]),
    ("uppercase", True, ["ALL BIG, 7"], ["ONE small", "123"]),
    ("json", True, ['{"a": 1}', "[1]", '```json\n{"a": 1}\n```'], ["{a: 1}", "7", "text", 'Here: {"a": 1}']),
    ("json", ["a", "b"], ['{"a": 1, "b": 2}'], ['{"a": 1}', '["a", "b"]']),
    ("one_of", ["yes", "no"], ["Yes.", "**no**"], ["yes and no", "maybe"]),
    ("language", "fr", ["Le chat est dans la maison et il dort."], ["The cat is in the house and it sleeps."]),
    ("language", "zh", ["今天天气很好。"], ["今日はとても良い天気です。", "Today."]),
]


@pytest.mark.parametrize(("name", "value", "good", "bad"), CASES)
def test_check(name, value, good, bad):
    for text in good:
        assert failed_checks(text, {name: value}) == [], text
    for text in bad:
        assert failed_checks(text, {name: value}) == [name], text
    assert failed_checks(" \n", {name: value}) == [name]


def test_every_check_is_tested():
    assert {name for name, *_ in CASES} == set(CHECKS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No full stop", 1),
        ("It costs 3.14 dollars.", 1),
        ("Dr. Smith met Mr. J. Brown. They talked.", 2),
        ("Fruits, e.g. apples, are good.", 1),
        ("Really?! Yes... I think so.", 3),
        ('He said "Stop." Then he left.', 2),
        ("1. Apples.\n2. Pears.", 2),
        ("他来了。她走了", 2),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize(("text", "count"), [("", 0), ("a b", 2), ("a — b", 2), ("don't stop", 2), ("我爱Python 3", 4)])
def test_words(text, count):
    assert count_words(text) == count


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The cat is in the house and it sleeps.", "en"),
        ("Die Katze ist in dem Haus und sie schläft.", "de"),
        ("El gato está en la casa y no come.", "es"),
        ("Le chat est dans la maison et il dort.", "fr"),
        ("Il gatto è nella casa e non mangia per la fame.", "it"),
        ("De kat is in het huis en hij slaapt niet.", "nl"),
        ("O gato está na casa e não come muito.", "pt"),
        ("Кошка спит дома.", "ru"),
        ("今日はとても良い天気です。", "ja"),
        ("오늘은 날씨가 좋다.", "ko"),
        ("今天天气很好。", "zh"),
        ("القط في البيت", "ar"),
        ("12345", None),
        ("Xylophon", None),
    ],
)
def test_language(text, code):
    assert detect_language(text) == code


def test_all_constraints_must_hold():
    check = {"words_max": 5, "includes": ["sea"], "lowercase": True}
    item = Item("0", {"prompt": "?", "check": check})
    probe = Instruction("test", [item])
    assert probe.judge(item, Generated("the blue sea", 3, True)) == (1.0, json.dumps(check), {"failed": []})
    assert probe.judge(item, Generated("The blue lake", 3, True))[::2] == (0.0, {"failed": ["includes", "lowercase"]})


@pytest.mark.parametrize(
    "check",
    [{}, [], "words", {"words": 5}, {"words_max": "5"}, {"words_max": -1}, {"words_max": True}, {"lowercase": False},
     {"includes": []}, {"includes": [7]}, {"language": "klingon"}, {"json": "yes"}],
)  # fmt: skip
def test_unknown_checks_are_an_error(check):
    with pytest.raises(DataError, match="check"):
        Instruction("test", [Item("0", {"prompt": "?", "check": check})])


def test_a_misspelt_check_is_recognised():
    with pytest.raises(DataError, match="Did you mean 'words_max'"):
        Instruction("test", [Item("0", {"prompt": "?", "check": {"word_max": 5}})])
