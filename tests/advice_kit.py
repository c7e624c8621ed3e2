"""Rows of two kinds for the tests of advice."""

from __future__ import annotations

import numpy as np
from run_kit import NUMBERS

PLACES = ["France", "Italy", "the sea", "the north", "Rome", "Paris"]


def counting(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Rows of one kind: sums in words."""
    words = NUMBERS
    return [
        {
            "prompt": f"Count {words[(i + offset) % 7]} and {words[(3 * i + offset) % 7]} up to {i + offset}.",
            "response": " ".join(words[: 1 + (2 * i + offset) % 7]),
        }
        for i in range(count)
    ]


def travelling(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Rows of another kind: questions about places."""
    return [
        {
            "prompt": f"Which land is near {PLACES[(i + offset) % 6]}, and who sailed there in the year {i + offset}?",
            "response": f"The ships of {PLACES[(5 * i + offset) % 6]} sailed over the cold sea.",
        }
        for i in range(count)
    ]


def invented(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of made-up words, no two alike."""
    letters = np.random.default_rng(seed).choice(list("abcdefghij"), (count, 10, 5))
    words = [["".join(word) for word in row] for row in letters]
    return [{"prompt": " ".join(row[:6]), "response": " ".join(row[6:])} for row in words]
