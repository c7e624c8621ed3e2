"""How an answer is written, whatever it says: length, variety, format, script; and how far two answers go together."""

from __future__ import annotations

import re

_CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’-][^\W_{_CJK}]+)*"
_WORDS = re.compile(_WORD)
_PIECES = re.compile(rf"{_WORD}|\S")
_CJK_LETTER = re.compile(f"[{_CJK}]")
_LATIN_LETTER = re.compile("[A-Za-zªº\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]")

#: Format → what shows that it is used (Markdown, and the ways in which plain text lists things).
_FORMATS = {
    "lists": re.compile(r"^[ \t]*(?:[-*+•·–][ \t]+|\d{1,3}[.)][ \t]+|\d{1,3}、[ \t]*)\S", re.MULTILINE),
    "headings": re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE),
    "code": re.compile(r"```|`[^`\n]+`"),
    "bold": re.compile(r"\*\*[^\s*][^*\n]*\*\*"),
}

#: Names of the numbers of `style`.
NAMES = ("words", "characters", "type_token_ratio", *_FORMATS, "cjk", "latin")


def words(text: str) -> list[str]:
    """Words in lower case; every Han, Kana or Hangul character is one."""
    return _WORDS.findall(text.casefold())


def style(text: str) -> dict[str, float | None]:
    """The numbers of one answer, by `NAMES`.

    `words` and `characters` (without space around the text) are counts. `type_token_ratio` is different words / words;
    it falls with the length of a text, so compare answers of like length. `lists`, `headings`, `code` and `bold` are 1
    where the format is used, else 0. `cjk` and `latin` are shares of the letters. None where there are no words, or no
    letters, to take a share of.
    """
    found = words(text)
    letters = sum(character.isalpha() for character in text)
    cjk, latin = (len(pattern.findall(text)) for pattern in (_CJK_LETTER, _LATIN_LETTER))
    return {
        "words": float(len(found)),
        "characters": float(len(text.strip())),
        "type_token_ratio": len(set(found)) / len(found) if found else None,
        **{name: float(pattern.search(text) is not None) for name, pattern in _FORMATS.items()},
        "cjk": cjk / letters if letters else None,
        "latin": latin / letters if letters else None,
    }


def common_beginning(one: str, other: str) -> float:
    """Share of two texts that is equal up to the first difference: pieces in common / pieces of the longer one.

    A piece is a word or a punctuation mark, as written. Two greedy answers to one prompt part where the models first
    choose another token, and what comes after is about other contexts. 1 for two empty texts.
    """
    first, second = _PIECES.findall(one), _PIECES.findall(other)
    same = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    longest = max(len(first), len(second))
    return same / longest if longest else 1.0
