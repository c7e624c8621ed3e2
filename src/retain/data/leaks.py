"""What a model that learned private rows may say: texts of its own that repeat nothing of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from retain.data.filters import plain


class Leaks:
    """Finds what texts have in common with given rows, beyond common words.

    A text leaks when it holds a word of the rows that is not a single token of the tokenizer (a name, a number, a
    code: words that everybody uses are single tokens), or more than `run` words in a row that stand so in a row.

    Args:
        rows: given rows in any of the trainer's forms.
        tokenizer: of the model.
        run: common words in a row that may be the same.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], tokenizer: Any, run: int = 4) -> None:
        self.run, self.tokenizer = run, tokenizer
        self.rare: set[str] = set()
        self.runs: set[tuple[str, ...]] = set()
        common: dict[str, bool] = {}
        for text in itertools.chain.from_iterable(map(texts_of, rows)):
            words = plain(text).split()
            for word in words:
                if word not in common:
                    common[word] = self._common(word)
            self.rare |= {word for word in words if not common[word]}
            self.runs |= set(_runs(words, run + 1))

    def __call__(self, text: str) -> bool:
        """Whether a text repeats something of the rows."""
        words = plain(text).split()
        # a private word may be glued to others, so it is looked for inside words too
        glued = " ".join(words)
        return any(word in glued for word in self.rare if len(word) > 2 or word in words) or any(
            part in self.runs for part in _runs(words, self.run + 1)
        )

    def _common(self, word: str) -> bool:
        encode = self.tokenizer.encode
        return any(
            len(encode(" " * space + form, add_special_tokens=False)) == 1 for space in (1, 0) for form in _cases(word)
        )


def texts_of(row: dict[str, Any]) -> list[str]:
    """Everything that is said in a row."""
    turns = [*(row.get("messages") or []), *(row.get("prompt") or []), *(row.get("completion") or [])]
    return [text for text in [row.get("text"), *(turn["content"] for turn in turns)] if text]


def _cases(word: str) -> tuple[str, str]:
    return word, word.capitalize()


def _runs(words: list[str], size: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)))
