"""Questions with their answers out of what a model wrote: JSON or lines, repaired where that is sure.

What is repaired has one reading: code fences and talk around JSON, commas before a bracket, Python's quotes,
typographic quotes as delimiters, a list that was cut off behind whole entries; in lines, numbers, markup and quotes
around a text. What has none is dropped and its reason counted.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

_FENCE = re.compile(r"```[\w-]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_JSON = re.compile(r"[\[{]\s*[\"'“\[{]")
_ASKS = ("question", "q", "prompt")
_TELLS = ("answer", "a", "response", "ground_truth", "correct_answer")
_MARKUP = r"[\s*_#>]*"
_NUMBER = r"(?:\(?\d{1,3}[.):](?!\d)|[-•])"  # not of "3.5" or "10:30"
_MARKED = re.compile(
    rf"^{_MARKUP}(?:{_NUMBER}{_MARKUP})?"
    rf"(?:(?:the )?(?:(?P<asks>q(?:uestion)?)|answer)(?:\s*\d{{1,3}})?{_MARKUP}[:.)]|a(?:\s*\d{{1,3}})?{_MARKUP}:)"
    rf"{_MARKUP}",
    re.IGNORECASE,
)
_ONE_LINE = re.compile(
    rf"^{_MARKUP}{_NUMBER}{_MARKUP}(?P<q>[^?？]+[?？]){_MARKUP}(?:[-–—:→]+|\(?answer:){_MARKUP}(?P<a>.+)$",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^\s*\(?[A-Ea-e][).]\s")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "「": "」", "`": "`"}
_BROKEN = "broken JSON entry"


class Written(NamedTuple):
    """Pairs of (question, answer), what was repaired and what was dropped on the way: reason → count."""

    pairs: list[tuple[str, str]]
    repaired: Counter[str]
    dropped: Counter[str]


def pairs(text: str, finished: bool = True) -> Written:
    """The questions and answers in a reply; a reply without any counts as one dropped.

    Args:
        finished: whether the model ended by itself; else the last answer of lines may be cut off, and is dropped.
    """
    found = Written([], Counter(), Counter())
    body = text.strip()
    if "```" in body:
        inside = "\n".join(_FENCE.findall(body)).strip()
        holds = _JSON.search(inside) or any(map(_MARKED.match, inside.splitlines()))
        body = inside if holds else re.sub(r"```[\w-]*", "", body).strip()
        found.repaired["code fence"] += 1
    looks_json = _JSON.search(body)
    raw = list(_json_pairs(body[looks_json.start() :], found)) if looks_json else []
    if looks_json and (raw or found.dropped):
        if body[: looks_json.start()].strip():
            found.repaired["text around JSON"] += 1
    else:
        raw = list(_line_pairs(body, found))
        if raw and not finished and body.endswith(raw[-1][1].rpartition(" ")[2]):
            raw.pop()
            found.dropped["cut-off answer"] += 1
    for question, answer in raw:
        question, answer = _cleaned(question, found.repaired, True), _cleaned(answer, found.repaired, False)
        if question and answer:
            found.pairs.append((question, answer))
        else:
            found.dropped["empty answer" if question else "empty question"] += 1
    if not raw and not found.dropped:
        found.dropped["no question with an answer in the reply" if body else "empty reply"] += 1
    return found


# -------------------------------------------------------------------------------------------------------- JSON


def _json_pairs(body: str, found: Written) -> Iterator[tuple[str, str]]:
    """Pairs of a JSON text: read whole where it can be, else entry by entry."""
    try:
        content, end = json.JSONDecoder().raw_decode(body)
    except (json.JSONDecodeError, RecursionError):
        yield from _entries(body, found)
        return
    rest = body[end:].lstrip()
    if isinstance(content, dict) and (rest.lstrip(", \n").startswith("{") or not _is_column(content)):
        if rest:  # one object a line, without the brackets of a list
            yield from _entries(body, found)
            return
        several = [value for value in content.values() if isinstance(value, list)]
        content = several[0] if len(several) == 1 and all(isinstance(one, dict) for one in several[0]) else [content]
    elif isinstance(content, dict):
        yield from _columns(content, found)
        content = []
    if rest:
        found.repaired["text around JSON"] += 1
    for entry in content if isinstance(content, list) else []:
        yield from _entry(entry, found)


def _is_column(content: dict[str, Any]) -> bool:
    return isinstance(content.get("questions"), list)


def _columns(content: dict[str, Any], found: Written) -> Iterator[tuple[str, str]]:
    """`{"questions": […], "answers": […]}`."""
    questions = content["questions"]
    answers: list[Any] = next(
        (content[key] for key in ("ground_truths", "answers") if isinstance(content.get(key), list)), []
    )
    if questions and all(isinstance(one, dict) for one in questions):
        for one in questions:
            yield from _entry(one, found)
    elif len(answers) != len(questions):
        found.dropped["as many answers as questions are needed"] += max(1, len(questions))
    else:
        for pair in zip(questions, answers):
            yield from _entry(list(pair), found)


def _entries(body: str, found: Written) -> Iterator[tuple[str, str]]:
    """Objects of a JSON text that cannot be read as a whole, one after the other."""
    place = 0
    while (start := body.find("{", place)) >= 0:
        try:
            entry, place = json.JSONDecoder().raw_decode(body, start)
        except (json.JSONDecodeError, RecursionError):
            end = body.find("}", start)
            if end < 0:
                found.dropped["cut-off entry"] += 1
                break
            entry, place = _mended(body[start : end + 1], found), end + 1
        if isinstance(entry, dict) and _is_column(entry):
            yield from _columns(entry, found)
        elif entry is not None:
            yield from _entry(entry, found)
    if body.startswith("[") and "]" not in body[place:]:
        found.repaired["cut-off list"] += 1


def _mended(text: str, found: Written) -> Any:
    """One object in the forms of JSON that have only one reading; None, and counted, where there is none."""
    plain = re.sub(r",\s*}$", "}", text)
    typographic = re.sub(r"[“”]", '"', plain) if plain.count('"') == 0 else plain
    escaped = re.sub(r"[\r\n]+\s*", " ", typographic)
    for reason, one in (("comma", plain), ("typographic quotes", typographic), ("line break in a text", escaped)):
        try:
            entry = json.loads(one)
        except json.JSONDecodeError:
            continue
        found.repaired[reason] += 1
        return entry
    try:
        entry = ast.literal_eval(plain)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found.dropped[_BROKEN] += 1
        return None
    found.repaired["Python quotes"] += 1
    return entry


def _entry(entry: Any, found: Written) -> Iterator[tuple[str, str]]:
    if isinstance(entry, dict):
        named = {str(key).strip().casefold().replace(" ", "_"): value for key, value in entry.items()}
        question, answer = (next((named[key] for key in keys if key in named), None) for keys in (_ASKS, _TELLS))
    elif isinstance(entry, list) and len(entry) == 2:
        question, answer = entry
    else:
        found.dropped[_BROKEN] += 1
        return
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(question, str):
        found.dropped["entry without a question"] += 1
    elif not isinstance(answer, str):
        found.dropped["question without an answer"] += 1
    else:
        yield question, answer


# ------------------------------------------------------------------------------------------------------- lines


def _line_pairs(body: str, found: Written) -> Iterator[tuple[str, str]]:
    """`Q: …` and `A: …`, or a numbered question with its answer behind it on the line."""
    question: str | None = None
    answer: list[str] = []
    options = False
    for line in [*body.splitlines(), "Q:"]:
        mark, one = _MARKED.match(line), _ONE_LINE.match(line)
        ends = bool(mark and mark["asks"]) or bool(one and not mark) or (bool(answer) and not line.strip())
        if ends and question is not None:
            if options:
                found.dropped["multiple choice"] += 1
            elif answer:
                yield question, " ".join(answer)
            elif question:
                found.dropped["question without an answer"] += 1
            question, answer, options = None, [], False
        if mark:
            text = line[mark.end() :].strip()
            if mark["asks"]:
                question = text
            elif question is None:
                found.dropped["answer without a question"] += 1
            elif answer:
                found.dropped["second answer"] += 1
            else:
                answer = [text]
        elif one:
            yield one["q"], one["a"]
            found.repaired["answer on the line of its question"] += 1
        elif answer:
            answer.append(line.strip())
        elif question is not None and line.strip():
            options = options or bool(_OPTION.match(line))
            question = f"{question} {line.strip()}"


def _cleaned(text: str, repaired: Counter[str], question: bool) -> str:
    """A text without what stands around it: markup, a second `Question:` or `Answer:`, a question's number."""
    text = " ".join(text.split())
    for reason, pattern in (("markup", r"^[*_#]+(.*?)[*_]*$|^(.*?)[*_]+$"), ("number", rf"^{_NUMBER}\s+(.*)$")):
        if (reason == "markup" or question) and (match := re.match(pattern, text)):
            text = next(part for part in match.groups() if part is not None).strip()
            repaired[reason] += 1
    if (mark := _MARKED.match(text)) and bool(mark["asks"]) == question:
        text = text[mark.end() :].strip()
        repaired["mark written twice"] += 1
    inside = text[1:-1]
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in inside and text[-1] not in inside:
        text = inside.strip()
        repaired["quotes"] += 1
    return text
