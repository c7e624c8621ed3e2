"""Domain question sets: the questions of one domain with their right answers, as rows.

    {"domain_name": "history", "questions": ["…", …], "ground_truths": ["…", …], "levels": ["basic", …]}

A right answer is a text or a number, or a list of them that are all accepted. `levels` may be missing, and so may the
answers where only prompts are wanted. Everything else in the object is left alone (`made` says what wrote it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from retain.data.matching import words
from retain.errors import DataError

#: Tokens that a written answer may have, when its right answers are long.
MOST_TOKENS = 256


def is_set(content: Any) -> bool:
    """Whether a JSON value is a domain question set."""
    return isinstance(content, dict) and "questions" in content


def set_rows(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A set as rows with `prompt`, `response` (and `answers`, where several are right), `domain` and `level`.

    Args:
        where: what errors begin with, such as the file.

    Raises:
        DataError: not lists, lengths that differ, or a question or answer that is empty or no text; with its number.
    """
    name = content.get("domain_name")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise DataError(f"{where}: domain_name {name!r} given; allowed is a text that is not empty.")
    where = where if name is None else f"{where}, domain '{name}'"
    questions = content["questions"]
    columns = {key: content[key] for key in ("ground_truths", "levels") if content.get(key) is not None}
    for key, values in {"questions": questions, **columns}.items():
        if not isinstance(values, list):
            kind = type(values).__name__
            raise DataError(f"{where}: 'questions', 'ground_truths' and 'levels' must be lists; '{key}' is a {kind}.")
        if len(values) != len(questions):
            raise DataError(f"{where}: {len(questions)} questions but {len(values)} {key}. Give one for each.")
    if not questions:
        raise DataError(f"{where}: no questions. Give at least one.")
    rows = []
    for number, question in enumerate(questions, start=1):
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}, question {number}: {question!r} given; allowed is a text that is not empty.")
        row: dict[str, Any] = {"prompt": question}
        if "ground_truths" in columns:
            row |= _answers(columns["ground_truths"][number - 1], f"{where}, ground_truth {number}")
        if name is not None:
            row["domain"] = name
        if "levels" in columns:
            row["level"] = columns["levels"][number - 1]
        rows.append(row)
    return rows


def _answers(given: Any, where: str) -> dict[str, Any]:
    several = given if isinstance(given, list) else [given]
    texts = [str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one for one in several]
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise DataError(f"{where}: {given!r} given; allowed is a text, a number, or a list of them, none empty.")
    return {"response": texts[0]} | ({"answers": texts} if isinstance(given, list) else {})


def answer_tokens(answers: str | Iterable[str]) -> int:
    """Tokens that a written answer needs to hold the longest of the right ones, with a few words around it."""
    longest = max(len(words(text, articles=True)) for text in ([answers] if isinstance(answers, str) else answers))
    return min(MOST_TOKENS, 2 * longest + 16)
