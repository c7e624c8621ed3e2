"""Which rows of a buffer are worth a place: priorities from text, drawing by them, correcting for it, keeping.

Everything is a pure function of its arguments; draws take their own generator.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from retain.errors import ConfigError

#: A word: one character of a script written without spaces, or a run of letters and digits of any other.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def probabilities(values: np.ndarray, exponent: float, floor: float) -> np.ndarray:
    """P(i) = (max(u_i, 0) + ε)^a / Σ_j (max(u_j, 0) + ε)^a  (prioritised replay, arXiv:1511.05952, eq. 1).

    Args:
        values: [N] u, N ≥ 1; what is below 0 counts as 0.
        exponent: a ≥ 0; 0 is uniform.
        floor: ε > 0, in the unit of the values.

    Returns:
        float64 [N], all above 0, with sum 1.

    Raises:
        ConfigError: a value that is no finite number, or a and ε out of range.
    """
    values = np.asarray(values, np.float64)
    if exponent < 0 or floor <= 0:
        raise ConfigError(f"priorities: exponent {exponent}, floor {floor} given; allowed: exponent ≥ 0, floor > 0.")
    if not len(values) or not np.isfinite(values).all():
        raise ConfigError("priorities: they must be finite numbers, one for each row, of at least one row.")
    logs = exponent * np.log(np.maximum(values, 0) + floor)
    odds = np.maximum(np.exp(logs - logs.max()), np.finfo(np.float64).tiny)
    return odds / odds.sum()


def draw(chances: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Rows for `number` places: each place holds row i with probability P(i), and i comes number·P(i) times on average.

    One random offset picks equally spaced points on the row of all P, which are shuffled before (systematic
    sampling, Madow 1949). A row therefore comes ⌊number·P(i)⌋ or ⌈number·P(i)⌉ times, and twice only where
    number·P(i) > 1.

    Returns:
        int64 [number], in random order.
    """
    order = random.permutation(len(chances))
    edges = np.cumsum(chances[order])
    points = (np.arange(number) + random.random()) / max(number, 1) * edges[-1]
    found = np.minimum(np.searchsorted(edges, points, side="right"), len(chances) - 1)
    return random.permutation(order[found])


def importance_weights(chances: np.ndarray, correction: float) -> np.ndarray:
    """w_i = (1 / (N P(i)))^b / max_j w_j  (arXiv:1511.05952, section 3.4).

    With b = 1 rows drawn with P and weighed with w have, up to the constant max_j w_j, the expected gradient of rows
    drawn uniformly.

    Args:
        chances: [N] P, all above 0.
        correction: b in [0, 1]; 0 gives ones.

    Returns:
        float64 [N] in (0, 1].
    """
    return (chances.min() / chances) ** correction


def annealed(start: float, progress: float) -> float:
    """b(t) = start + (1 − start) t, for t in [0, 1]; values outside are taken as the nearest end."""
    return start + (1 - start) * min(1.0, max(0.0, progress))


def words(text: str) -> list[str]:
    """The words of a text, in order, without regard to case; Chinese and Japanese characters each count as one."""
    return [word.casefold() for word in _WORD.findall(text)]


def term_priorities(texts: Sequence[str], terms: Sequence[str] = ()) -> np.ndarray:
    """How much each text says with key terms, [N] in [0, 1].

    With `terms`: the share of them that the text contains, whatever the case. Without: the mean of ln(N/n_w) / ln N
    over its different words w, n_w = texts with w; 1 where no other text has any of its words.
    """
    if terms:
        wanted = [term.casefold() for term in terms]
        return np.array([np.mean([term in text.casefold() for term in wanted]) for text in texts], np.float64)
    found = [sorted(set(words(text))) for text in texts]
    counts = Counter(word for different in found for word in different)
    most = math.log(max(2, len(texts)))
    rare = {word: math.log(len(texts) / count) / most for word, count in counts.items()}
    return np.array([math.fsum(rare[word] for word in own) / max(1, len(own)) for own in found], np.float64)


def highest(values: np.ndarray, number: int, ties: np.ndarray) -> np.ndarray:
    """The rows with the highest values, in their order.

    A row without a value (NaN) counts as the mean of those that have one: nothing better is known of it. Of equal
    values the larger `ties` wins, so that with random ones equal rows are a uniform sample.

    Args:
        values, ties: [N].
        number: how many are kept.

    Returns:
        int64 [min(number, N)], ascending.
    """
    values = np.asarray(values, np.float64)
    known = values[np.isfinite(values)]
    filled = np.where(np.isnan(values), known.mean() if len(known) else 0.0, values)
    return np.sort(np.lexsort((ties, filled))[::-1][:number])


def shares(counts: Sequence[int] | np.ndarray, number: int) -> np.ndarray:
    """How many of each group are kept so that groups are as equal as their sizes allow: min(n_g, level).

    What is left over below one more for each goes to the largest groups first.

    Args:
        counts: [G] sizes.
        number: rows kept in all; all of them where there are no more.

    Returns:
        int64 [G] with sum min(number, Σ counts).
    """
    counts = np.asarray(counts, np.int64)
    number = min(number, int(counts.sum()))
    low, high = 0, int(counts.max(initial=0))
    while low < high:  # the highest level that still fits
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(counts, level).sum() <= number else (low, level - 1)
    kept = np.minimum(counts, low)
    for group in np.argsort(-counts, kind="stable")[: number - int(kept.sum())]:
        kept[group] += 1
    return kept


def spread(groups: np.ndarray, number: int, ties: np.ndarray) -> np.ndarray:
    """Rows kept so that every group keeps `shares` of them; within a group those with the largest `ties`.

    Args:
        groups: [N] group of each row, integers.
        ties: [N].

    Returns:
        int64 [min(number, N)], ascending.
    """
    _, groups = np.unique(groups, return_inverse=True)
    kept = shares(np.bincount(groups), number)
    order = np.lexsort((-np.asarray(ties), groups))
    first = np.concatenate([[0], np.cumsum(np.bincount(groups))[:-1]])
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - first[groups[order]]
    return np.flatnonzero(rank < kept[groups])
