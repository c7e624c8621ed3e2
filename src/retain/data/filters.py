"""Which of the rows a model wrote are worth replaying, and why the others are not."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Why a text is left out that repeats one of `Filters.avoid`.
PROBE_ITEM = "near a probe item"


@dataclass
class Filters:
    """What a row must be like. Lengths are in tokens; `prompt_tokens` and `response_tokens` bound the writing too.

    Args:
        prompt_tokens, response_tokens: most tokens of each part.
        min_prompt_words: fewest words of an instruction (characters/2 where words are not spaced).
        min_response_characters: fewest characters of a response.
        similarity: rows whose instructions share more than this part of their word pairs (Jaccard index over
            words, and pairs of neighbouring words, in one spelling) are near-duplicates.
        repetition: a part whose share of different word triples is below this is a loop.
        avoid: texts that no part of a row may repeat (see `Avoided`): the items of the probes.
        scripts: script → largest share of the rows, such as {"latin": 0.8}; scripts that are not named are free.
    """

    prompt_tokens: int = 64
    response_tokens: int = 192
    min_prompt_words: int = 3
    min_response_characters: int = 2
    similarity: float = 0.6
    repetition: float = 0.7
    avoid: Iterable[str] = ()
    scripts: Mapping[str, float] = field(default_factory=dict)


class Sieve:
    """Says of each text whether it stays, and counts the reasons why not."""

    def __init__(self, number: int, filters: Filters, dropped: Counter[str]) -> None:
        self.filters, self.dropped = filters, dropped
        self.near = NearDuplicates(filters.similarity)
        self.avoided = Avoided(filters.avoid, filters.similarity)
        self.scripts: Counter[str] = Counter()
        self.quota = {script: max(1, round(share * number)) for script, share in filters.scripts.items()}

    def instruction(self, text: str, done: bool, roles: Sequence[str]) -> bool:
        """Whether an instruction stays; it then counts as seen."""
        words = max(len(text.split()), len(text) // 2 if main_script(text) in ("cjk", "hiragana", "katakana") else 0)
        return self._no(
            ("unfinished instruction", bool(text) and not done),
            ("empty", not text),
            ("special tokens inside", any(token in text for token in roles)),
            ("too short", words < self.filters.min_prompt_words),
            ("repeats itself", loops(text, self.filters.repetition)),
            (PROBE_ITEM, self.avoided(text)),
            ("near-duplicate", text and self.near.seen(text)),
            ("over the share of its script", self._full(text)),
        ) and self._take(text)

    def text(self, text: str, roles: Sequence[str]) -> bool:
        """Whether a plain text stays."""
        return self.instruction(text, True, roles)

    def response(self, instruction: str, text: str, done: bool, roles: Sequence[str]) -> bool:
        """Whether an answer stays."""
        return self._no(
            ("unfinished answer", bool(text) and not done),
            ("empty answer", not text),
            ("special tokens inside", any(token in text for token in roles)),
            ("too short", len(text) < self.filters.min_response_characters),
            ("repeats itself", loops(text, self.filters.repetition)),
            ("answer repeats the instruction", plain(text) == plain(instruction)),
            # the instruction too, as words may have been put behind it since it was looked at
            (PROBE_ITEM, self.avoided(text) or self.avoided(instruction)),
        )

    def _no(self, *reasons: tuple[str, Any]) -> bool:
        reason = next((name for name, holds in reasons if holds), None)
        if reason:
            self.dropped[reason] += 1
        return reason is None

    def _full(self, text: str) -> bool:
        script = main_script(text)
        return script in self.quota and self.scripts[script] >= self.quota[script]

    def _take(self, text: str) -> bool:
        self.near.add(text)
        self.scripts[main_script(text)] += 1
        return True


class Avoided:
    """Tells texts that repeat one of those to be avoided: near-duplicates, and where one holds the other whole.

    Args:
        texts: to be avoided.
        similarity: as in `Filters`.
        fewest: words of a text that counts as repeated when another holds it; shorter ones stand in others by chance.
    """

    def __init__(self, texts: Iterable[str], similarity: float = Filters.similarity, fewest: int = 4) -> None:
        self.near, self.fewest = NearDuplicates(similarity), fewest
        self.words: list[tuple[str, int]] = []
        for text in texts:
            self.near.add(text)
            self.words.append(self._counted(text))

    def __call__(self, text: str) -> bool:
        """Whether a text repeats one of them."""
        if not text or not self.words:
            return False
        mine, count = self._counted(text)
        return self.near.seen(text) or any(
            (number >= self.fewest and words in mine) or (count >= self.fewest and mine in words)
            for words, number in self.words
        )

    @staticmethod
    def _counted(text: str) -> tuple[str, int]:
        words = plain(text)
        return f" {words} ", len(words.split())


class NearDuplicates:
    """Near-duplicates by the Jaccard index of word and word-pair sets, |A ∩ B| / |A ∪ B|, over an inverted index."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.sizes: list[int] = []
        self.places: dict[str, list[int]] = {}

    def seen(self, text: str) -> bool:
        """Whether a text is near one that was added."""
        shingles = self._shingles(text)
        common = Counter(place for shingle in shingles for place in self.places.get(shingle, ()))
        return any(
            shared >= self.threshold * (len(shingles) + self.sizes[place] - shared) for place, shared in common.items()
        )

    def add(self, text: str) -> None:
        """Remember a text."""
        shingles = self._shingles(text)
        for shingle in shingles:
            self.places.setdefault(shingle, []).append(len(self.sizes))
        self.sizes.append(len(shingles))

    @staticmethod
    def _shingles(text: str) -> set[str]:
        words = plain(text).split()
        return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))} or {text}


def plain(text: str) -> str:
    """One spelling: compatibility forms folded, no case, no punctuation; unspaced scripts character by character."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", folded)
    return " ".join(re.findall(r"\w+", spaced))


def loops(text: str, threshold: float) -> bool:
    """Whether the share of different word triples is below the threshold; short texts are left alone."""
    words = plain(text).split()
    triples = list(zip(words, words[1:], words[2:]))
    return len(triples) >= 8 and len(set(triples)) < threshold * len(triples)


def main_script(text: str) -> str:
    """The script of most of its letters, as the first word of their Unicode names: latin, cjk, cyrillic, …"""
    names = Counter(unicodedata.name(letter, "?").split()[0].lower() for letter in text if letter.isalpha())
    return names.most_common(1)[0][0] if names else "none"


def to_last_sentence(text: str) -> str:
    """Text that was cut off, up to its last whole sentence; "" when there is none."""
    ends = [match.end() for match in re.finditer(r"(?<!\d)[.!?][\"'”’)]?(?=\s|$)|[。！？]", text)]
    return text[: ends[-1]] if ends else ""
