"""How answers are written: hand-counted texts."""

from __future__ import annotations

import pytest

from retain.functional.style import NAMES, common_beginning, style, words


def test_words_and_their_variety():
    found = style("The cat saw the other cat. It didn't run.")
    assert found["words"] == 9
    assert found["type_token_ratio"] == pytest.approx(7 / 9)  # the and cat are there twice
    assert found["characters"] == len("The cat saw the other cat. It didn't run.")
    assert list(found) == list(NAMES)
    assert words("It's a well-known café") == ["it's", "a", "well-known", "café"]


def test_characters_of_unspaced_scripts_are_words():
    assert words("我喜欢 Python 3") == ["我", "喜", "欢", "python", "3"]


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("Plain words - nothing else, 3.5 of them.", []),
        ("- one\n- two", ["lists"]),
        ("First:\n  1. one\n  2) two", ["lists"]),
        ("步骤：\n1、打开\n2、关闭", ["lists"]),
        ("# Title\ntext", ["headings"]),
        ("#hashtag", []),
        ("Use `print(1)`.", ["code"]),
        ("```python\nx = 2 ** 3 ** 2\n```", ["code"]),
        ("This is **very** good.", ["bold"]),
        ("2 ** 3 and 4 ** 5", []),
        ("## A\n* **b**: `c`", ["lists", "headings", "code", "bold"]),
    ],
)
def test_format(text, used):
    found = style(text)
    assert [name for name in ("lists", "headings", "code", "bold") if found[name]] == used


@pytest.mark.parametrize(
    ("text", "cjk", "latin"),
    [
        ("Hello, 42!", 0, 1),
        ("你好", 1, 0),
        ("你好 ab", 0.5, 0.5),
        ("ひらカナ한글", 1, 0),
        ("Привет", 0, 0),
        ("Übermäßig", 0, 1),
        ("42", None, None),
        ("", None, None),
    ],
)
def test_scripts_are_shares_of_the_letters(text, cjk, latin):
    found = style(text)
    assert (found["cjk"], found["latin"]) == (cjk, latin)


def test_an_empty_answer_has_no_variety():
    found = style("  ")
    assert (found["words"], found["characters"], found["type_token_ratio"]) == (0, 0, None)


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("", "", 1),
        ("", "a", 0),
        ("a b c d", "a b c d", 1),
        ("a b c d", "a b x d", 0.5),
        ("a b", "a b c d", 0.5),
        ("Yes.", "yes.", 0),
        ("Paris.", "Paris!", 0.5),
        ("北京是首都", "北京在北方", 0.4),
    ],
)
def test_common_beginning(one, other, share):
    assert common_beginning(one, other) == pytest.approx(share)
    assert common_beginning(other, one) == pytest.approx(share)
