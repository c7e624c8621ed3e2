"""The words of a report, one table of texts per language: `texts/en.yaml`, `texts/zh.yaml`.

Every table has the same keys. A text may have places, as in "{n} items"; where the number of things decides its form,
it is a mapping with `one` and `many`, chosen by `n`. A new language is a new file and its name in `LANGUAGES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from retain.errors import ConfigError, unknown

#: Name in settings and on the command line → its name in HTML.
LANGUAGES = {"en": "en", "zh": "zh-CN"}

_spoken: ContextVar[str] = ContextVar("language", default="en")


def check(language: str) -> None:
    """Raises ConfigError for a language without texts."""
    if language not in LANGUAGES:
        raise ConfigError(unknown("language of the report", language, LANGUAGES))


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Everything that is written inside is written in this language.

    Raises:
        ConfigError: a language without texts.
    """
    check(language)
    token = _spoken.set(language)
    try:
        yield
    finally:
        _spoken.reset(token)


def tag() -> str:
    """The language as HTML names it: "en", "zh-CN"."""
    return LANGUAGES[_spoken.get()]


@cache
def texts(language: str) -> dict[str, str | dict[str, str]]:
    """The table of a language: "section.name" → text, or {"one": text, "many": text}."""
    path = Path(__file__).parent / "texts" / f"{language}.yaml"
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {f"{section}.{name}": text for section, found in sections.items() for name, text in found.items()}


def say(key: str, **values: Any) -> str:
    """A text in the language that is spoken, with the values in their places.

    Raises:
        KeyError: there is no such text: a mistake in the code, not of the user.
    """
    text = texts(_spoken.get())[key]
    if isinstance(text, dict):
        text = text["one" if values["n"] == 1 else "many"]
    return text.format(**values)


def name(kind: str, word: str) -> str:
    """A word of `results.json` (a conclusion, a group, a metric) as the language has it; itself where it has none."""
    found = texts(_spoken.get()).get(f"{kind}.{word}", word)
    return found if isinstance(found, str) else word


def quoted(sentence: str) -> str:
    """A sentence that the run wrote into its results, in English, as the language says it; itself where it cannot.

    The section `quoted` has these sentences with places for what differs from run to run.
    """
    if _spoken.get() == "en":
        return sentence
    if "; " in sentence and all(quoted(part) != part for part in sentence.split("; ")):
        return say("list.semicolon").join(map(quoted, sentence.split("; ")))
    for key, pattern in _patterns().items():
        if found := pattern.fullmatch(sentence):
            return say(key, **found.groupdict())
    head, colon, rest = sentence.partition(": ")  # "tickets: 40 test rows from …"
    if colon and quoted(rest) != rest:
        return head + say("list.colon") + quoted(rest)
    return sentence


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    found = {}
    for key, text in texts("en").items():
        if key.startswith("quoted.") and isinstance(text, str):
            parts = re.split(r"\{(\w+)\}", text)
            parts[::2] = map(re.escape, parts[::2])
            parts[1::2] = [f"(?P<{place}>.+?)" for place in parts[1::2]]
            found[key] = re.compile("".join(parts), re.DOTALL)
    return found
