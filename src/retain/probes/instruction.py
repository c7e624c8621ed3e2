"""Instruction following: constraints that a program can check, in the manner of IFEval (arXiv:2311.07911)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from retain.data.matching import UNSPACED, words
from retain.errors import DataError, unknown
from retain.models.generation import Generated
from retain.probes.asking import WrittenProbe
from retain.probes.base import Item

_ABBREVIATIONS = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|no|fig|approx|inc|ltd|e\.g|i\.e|etc|cf|[a-z])\.$", re.IGNORECASE
)
_CLOSING = "\"'”’»)]*_"

#: Languages told by their script: code → beginnings of Unicode character names.
_SCRIPTS = {
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "zh": ("CJK",),
}
#: Languages in Latin letters, told by their commonest short words (without accents).
_COMMON = {
    "de": "der die das und ist nicht ein eine ich zu mit auf den von im es sie wir dem des sich fur am bei auch",
    "en": "the and is of to in it that this for was with are be on as you not have at from or his her they we",
    "es": "el la los las y es de que en un una no por con para del se lo su al como mas muy pero esta son",
    "fr": "le la les et est de que en un une pas pour avec du des dans il elle ce qui sur au nous je plus son",
    "it": "il lo la gli le e di che in un una non per con del della si sono ma anche come al nel piu ho mi",
    "nl": "de het een en is van dat in niet op te voor met zijn er aan ook maar om bij ik je hij ze wij naar",
    "pt": "o a os as e de que em um uma nao por com para do da se no na mais como mas ao foi seu sua eu muito",
}


def count_words(text: str) -> int:
    """Words between spaces that hold a letter or digit; every character of an unspaced script is one."""
    characters = len(re.findall(f"[{UNSPACED}]", text))
    rest = re.sub(f"[{UNSPACED}]", " ", text).split()
    return characters + sum(any(c.isalnum() for c in word) for word in rest)


def count_sentences(text: str) -> int:
    """Sentences: pieces that end in . ! ? … before a space or the end, or in 。！？, or at the end of the text.

    Common abbreviations and numbers do not end one.
    """
    count, piece = 0, ""
    for part in re.split(rf"([.!?…]+[{re.escape(_CLOSING)}]*(?=\s|$)|[。！？]+[”’」』）]*|\n+)", text):
        piece += part
        ends = re.fullmatch(rf"[.!?…。！？]+[{re.escape(_CLOSING)}」』）]*|\n+", part)
        if ends and not (part == "." and _ABBREVIATIONS.search(piece)):
            # A list number ("1.") is not a sentence, a line without a full stop is one.
            count += bool(re.search(r"[^\W\d]", piece)) or (bool(re.search(r"\d", piece)) and part != ".")
            piece = ""
    return count + any(c.isalnum() for c in piece)


def detect_language(text: str) -> str | None:
    """Code of the language by script, or by common words among de en es fr it nl pt; None when in doubt.

    A heuristic for answers of a sentence or more.
    """
    letters = [unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha()]
    if not letters:
        return None
    names = Counter(name.split("-")[0] for name in letters)
    if names["HIRAGANA"] + names["KATAKANA"] > 0.1 * len(letters):
        return "ja"
    for code, scripts in _SCRIPTS.items():
        if code != "ja" and sum(names[script] for script in scripts) > 0.5 * len(letters):
            return code
    if names["LATIN"] <= 0.5 * len(letters):
        return None
    given = words(text, articles=True)
    hits = Counter({code: sum(word in common.split() for word in given) for code, common in _COMMON.items()})
    (first, most), (_, next_most) = hits.most_common(2)
    return first if most > next_most else None


def _appears(text: str, phrase: str) -> bool:
    """Whole words, any case; punctuation in the phrase counts."""
    text, phrase = text.casefold(), phrase.casefold()
    letter = rf"[^\W{UNSPACED}]"
    front = rf"(?<!{letter})" if re.match(letter, phrase) else ""
    back = rf"(?!{letter})" if re.search(rf"{letter}$", phrase) else ""
    return re.search(front + re.escape(phrase) + back, text) is not None


def _is_json(text: str, wanted: Literal[True] | list[str]) -> bool:
    """Parses as an object or list, a code fence around it allowed; has the keys when they are given."""
    fence = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL)
    try:
        value = json.loads(fence[1] if fence else text)
    except json.JSONDecodeError:
        return False
    if wanted is True:
        return isinstance(value, dict | list)
    return isinstance(value, dict) and all(key in value for key in wanted)


def _phrases(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _plain(text: str) -> str:
    return text.strip(" \t\n.!。！\"'*`“”").casefold()


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _texts(value: Any) -> bool:
    return _text(value) or (isinstance(value, list) and bool(value) and all(map(_text, value)))


def _true(value: Any) -> bool:
    return value is True


#: name → (whether a value is allowed, whether the stripped text fulfils it)
CHECKS: dict[str, tuple[Callable[[Any], bool], Callable[[str, Any], bool]]] = {
    "words_max": (_number, lambda text, n: count_words(text) <= n),
    "words_min": (_number, lambda text, n: count_words(text) >= n),
    "words_exactly": (_number, lambda text, n: count_words(text) == n),
    "sentences_exactly": (_number, lambda text, n: count_sentences(text) == n),
    "lines_exactly": (_number, lambda text, n: sum(bool(line.strip()) for line in text.splitlines()) == n),
    "includes": (_texts, lambda text, value: all(_appears(text, one) for one in _phrases(value))),
    "excludes": (_texts, lambda text, value: not any(_appears(text, one) for one in _phrases(value))),
    "starts_with": (_text, lambda text, value: text.lstrip("\"'“*").casefold().startswith(value.casefold())),
    "ends_with": (_text, lambda text, value: text.rstrip("\"'”*").casefold().endswith(value.casefold())),
    "lowercase": (_true, lambda text, _: text == text.lower() != text.upper()),
    "uppercase": (_true, lambda text, _: text == text.upper() != text.lower()),
    "json": (lambda value: value is True or (isinstance(value, list) and all(map(_text, value))), _is_json),
    "language": (lambda value: value in {*_SCRIPTS, *_COMMON}, lambda text, code: detect_language(text) == code),
    "one_of": (_texts, lambda text, value: _plain(text) in map(_plain, _phrases(value))),
}


def failed_checks(text: str, check: dict[str, Any]) -> list[str]:
    """Names of the constraints that a text does not fulfil; an empty text fulfils none."""
    text = text.strip()
    return [name for name, value in check.items() if not text or not CHECKS[name][1](text, value)]


class Instruction(WrittenProbe):
    """Fields `prompt`, `check`: constraints that must all hold; optional `max_tokens`.

    Constraints (counts are of the whole answer): `words_max`, `words_min`, `words_exactly`,
    `sentences_exactly`, `lines_exactly` (lines that are not empty); `includes`, `excludes` (a text or a list,
    whole words, any case); `starts_with`, `ends_with` (any case); `lowercase`, `uppercase`: true; `json`: true,
    or the keys that must be there; `language`: ar de el en es fr he hi it ja ko nl pt ru th zh; `one_of`: the
    whole answer is one of these.
    """

    kind = "instruction"
    metric = "accuracy"
    group = "capability"
    fields = frozenset({"prompt", "check"})
    max_tokens = 128

    def __init__(self, name: str, items: list[Item], group: str | None = None, **options: Any):
        super().__init__(name, items, group, **options)
        for item in self.items:
            where = f"probe '{name}', item '{item.id}', check"
            check = item.fields["check"]
            if not isinstance(check, dict) or not check:
                raise DataError(f"{where}: {check!r} given; allowed is an object of {', '.join(sorted(CHECKS))}.")
            for key, value in check.items():
                if key not in CHECKS:
                    raise DataError(unknown(where, key, CHECKS))
                if not CHECKS[key][0](value):
                    raise DataError(
                        f"{where}.{key}: {value!r} is not allowed here; see `Instruction` for what each check takes."
                    )

    def judge(self, item: Item, answer: Generated) -> tuple[float, str, dict[str, Any]]:
        """1 when every constraint holds; details name those that fail."""
        check = item.fields["check"]
        failed = failed_checks(answer.text, check)
        return float(not failed), json.dumps(check, ensure_ascii=False), {"failed": failed}
