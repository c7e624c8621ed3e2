"""Questions of a domain with their answers, from basic to hard, written by a model.

No model code is here: `ask` may be a local model or any engine. What it writes is read by `retain.data.repair`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retain.data.demonstrations import Ask, rotated
from retain.data.filters import PROBE_ITEM, Avoided, NearDuplicates, loops, plain, to_last_sentence
from retain.data.matching import contains, words
from retain.data.repair import pairs
from retain.errors import ConfigError, DataError

#: Level → what is asked for, in rising order.
LEVELS = {
    "basic": "basic questions that a beginner in this domain can answer",
    "medium": "questions of medium difficulty that somebody who has studied this domain can answer",
    "hard": "hard questions that only an expert in this domain can answer",
}
#: What questions are about, in turn: a model that is only asked for questions returns to the same few.
ASPECTS = (
    *("the meaning of terms", "people", "places", "dates and the order of events", "numbers and quantities"),
    *("causes and effects", "how things work", "differences between things that are easily confused"),
    *("examples and uses", "rules and exceptions"),
)
LONGEST = 40  # words of an answer: a right answer has to be found again in what a model writes
SAME_ANSWER = 0.5  # similarity from which questions with the same answer are one question asked twice
_FORM = "Q: the question\nA: the answer"
_PLACEHOLDERS = {plain(text) for text in ("the question", "the answer", "question", "answer", "…", "...", "n/a")}


@dataclass(frozen=True)
class Question:
    """One question of a set."""

    question: str
    answer: str
    level: str


@dataclass
class Report:
    """What became of everything that was written.

    Args:
        kept: questions; `kept` and `dropped` add up to `tried`.
        tried: questions, or what stood in their place, that were written; a reply without any counts as one.
        replies: answers of the model.
        dropped, repaired: reason → count.
        levels: level → questions kept.
        seconds: wall time.
    """

    kept: int = 0
    tried: int = 0
    replies: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def sentence(self) -> str:
        """One line with every reason and its count."""
        parts = [f"{count} {level}" for level, count in self.levels.items()]
        text = f"{self.kept} of {self.tried} questions kept ({', '.join(parts) or 'none'}) in {self.seconds:.0f} s"
        for word, counts in (("dropped", self.dropped), ("repaired", self.repaired)):
            if counts:
                text += f"; {word}: " + ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        return text


def write_questions(
    ask: Ask,
    domain: str,
    number: int,
    seed: int = 0,
    *,
    description: str = "",
    material: Sequence[str] = (),
    chat: bool = True,
    each: int = 5,
    max_tokens: int = 400,
    temperature: float = 0.8,
    similarity: float = 0.8,
    specials: Sequence[str] = (),
    avoid: Sequence[str] = (),
    batch: int = 8,
    tries: float = 6.0,
    progress: Callable[[int], None] = lambda kept: None,
) -> tuple[list[Question], Report]:
    """Let a model write a question set, as many questions of each level as of the others.

    Args:
        ask: the model; with a deterministic one the set depends on `seed` and the settings alone.
        domain: its name, as a model understands it.
        number: questions wanted.
        seed: of the order of aspects and pieces of material.
        description: what belongs to the domain, in a sentence.
        material: texts of the domain; each request shows one, and asks about it.
        chat: whether requests are turns, or plain text that a base model goes on with.
        each: questions asked for in a request.
        max_tokens: of a reply.
        similarity: part of the word pairs that a question may share with another (as `Filters.similarity`); those with
            the same answer may share at most `SAME_ANSWER`.
        specials: tokens that no text may hold.
        avoid: texts that no question may repeat.
        batch: requests per call of `ask`.
        tries: give up after tries · number / each requests (at least two batches).
        progress: called after each batch with the number of questions just kept.

    Raises:
        ConfigError: an impossible setting.
        DataError: not one usable question was written; the reasons are in the message.
    """
    if number < 1 or each < 1 or batch < 1 or not domain.strip():
        raise ConfigError(f"questions: {number} of '{domain}', {each} a time. Give a domain, and 1 or more.")
    report, begun = Report(), time.perf_counter()
    sieve = _Sieve(similarity, specials, avoid)
    random = np.random.default_rng(seed)
    aspects = rotated(ASPECTS, 1, seed)
    pieces = rotated(material, 1, seed) if material else None
    share = {level: number // len(LEVELS) + (n < number % len(LEVELS)) for n, level in enumerate(LEVELS)}
    kept: list[Question] = []
    most, draw = max(2 * batch, math.ceil(tries * number / each)), 0
    while len(kept) < number and report.replies < most:
        before = len(kept)
        missing = {level: wanted - report.levels[level] for level, wanted in share.items()}
        levels = [level for level, count in missing.items() for _ in range(math.ceil(count / each))]
        rate = max(len(kept) / (each * report.replies), 0.1) if report.replies else 1.0
        levels = _spread(levels, min(batch, most - report.replies, math.ceil(len(levels) / rate)))
        requests = []
        for level in levels:
            about = next(pieces)[0] if pieces else next(aspects)[0]
            shown = [kept[i].question for i in sorted(random.permutation(len(kept))[:6])]
            requests.append(_request(domain, description, level, each, about, bool(pieces), shown, chat))
        for level, (text, finished) in zip(levels, ask(requests, max_tokens, temperature, draw), strict=True):
            report.replies += 1
            written = pairs(text if chat else f"Q: {text}", finished)
            report.repaired += written.repaired
            report.dropped += written.dropped
            report.tried += len(written.pairs) + written.dropped.total()
            for question, answer in written.pairs:
                reason = sieve.reason(question, answer)
                if reason is None and report.levels[level] >= share[level]:
                    reason = "not needed"
                if reason is None:
                    sieve.take(question, answer)
                    kept.append(Question(question, answer, level))
                    report.levels[level] += 1
                else:
                    report.dropped[reason] += 1
        report.kept, report.seconds = len(kept), time.perf_counter() - begun
        progress(len(kept) - before)
        draw += 1
    if not kept:
        raise DataError(
            f"questions about {domain}: none could be used. {report.sentence()}. Take a larger model, or give texts of "
            "the domain as material."
        )
    order = list(LEVELS)
    report.levels = Counter({level: report.levels[level] for level in order if report.levels[level]})
    return sorted(kept, key=lambda one: order.index(one.level)), report


def _spread(levels: list[str], count: int) -> list[str]:
    """So many requests, evenly over the levels of what is missing."""
    return [levels[place * len(levels) // count] for place in range(count)]


class _Sieve:
    """Says of each question why it does not stay, or None."""

    def __init__(self, similarity: float, specials: Sequence[str], avoid: Sequence[str]) -> None:
        self.specials, self.similarity = specials, similarity
        self.near, self.avoided = NearDuplicates(similarity), Avoided(avoid, similarity)
        self.same_answer: dict[str, NearDuplicates] = {}
        self.seen: set[str] = set()

    def reason(self, question: str, answer: str) -> str | None:
        spelled, said = plain(question), plain(answer)
        known = self.same_answer.get(said)
        reasons = (
            ("placeholder", spelled in _PLACEHOLDERS or said in _PLACEHOLDERS),
            ("special tokens inside", any(token in text for text in (question, answer) for token in self.specials)),
            ("question too short", len(words(question)) < 3),
            ("answer too long", len(words(answer, articles=True)) > LONGEST),
            ("repeats itself", loops(question, 0.7) or loops(answer, 0.7)),
            ("answer is a question", answer.endswith(("?", "？"))),
            ("answer stands in the question", contains(question, answer)),
            (PROBE_ITEM, self.avoided(question)),
            ("repeated question", _spelling(question) in self.seen),
            ("near-duplicate", self.near.seen(question) or (known is not None and known.seen(question))),
        )
        return next((name for name, holds in reasons if holds), None)

    def take(self, question: str, answer: str) -> None:
        self.near.add(question)
        self.seen.add(_spelling(question))
        self.same_answer.setdefault(plain(answer), NearDuplicates(min(SAME_ANSWER, self.similarity))).add(question)


def _spelling(text: str) -> str:
    return " ".join(text.casefold().split())


def _request(
    domain: str,
    description: str,
    level: str,
    each: int,
    about: str,
    is_material: bool,
    shown: Sequence[str],
    chat: bool,
) -> Any:
    """What the model is asked, as turns or as a text to go on with."""
    subject = f"{domain} ({description})" if description else domain
    if not chat:
        head = f"{about}\n\n" if is_material else ""
        return f"{head}Quiz about {subject}: {LEVELS[level]}, each with its short answer.\n\nQ:"
    topic = "this text" if is_material else about
    lines = [
        f"Write {each} {LEVELS[level]}, about {subject}. They should be about {topic}.",
        "Each question must be understood by itself" + (", without the text" if is_material else "") + ".",
        "Each answer must be right, short (one to ten words), and must not stand in the question.",
        f"Write nothing but questions and answers, in this form:\n{_FORM}",
    ]
    if is_material:
        lines.insert(1, f"Text:\n{about}")
    if shown:
        lines.append("Do not ask these again:\n" + "\n".join(f"- {question}" for question in shown))
    return [{"role": "user", "content": "\n\n".join(lines)}]


def cut(texts: Sequence[str], longest: int = 300) -> list[str]:
    """Material in pieces of at most so many words (characters, where words are not spaced), at ends of sentences if
    it can be."""
    pieces = []
    for text in texts:
        left = text.strip()
        while left:
            parts = left.split(" ")
            piece = left if len(parts) <= longest else " ".join(parts[:longest])
            piece = piece[: 8 * longest]
            if len(piece) < len(left):
                piece = to_last_sentence(piece) or piece
            pieces.append(piece.strip())
            left = left[len(piece) :].strip()
    return [piece for piece in pieces if piece]
