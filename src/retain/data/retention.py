"""Which rows stay when a buffer is full: those of the highest value, or rows spread over clusters of their text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from retain.data.diversity import kmeans
from retain.functional.priorities import highest, spread, words

#: Hashed words that a text is described by, and the dimensions they are brought down to.
FEATURES, DIMENSIONS = 2**15, 64


def keep(policy: str, rows: Any, size: int, seed: int, clusters: int) -> np.ndarray:
    """Positions of the rows that stay, ascending.

    Args:
        policy: "priority" keeps the highest `value`; "diversity" keeps the same number of each cluster.
        rows: a `datasets.Dataset` with `added_at` and, for "priority", `value`.
        size: how many stay.
        seed: of the draw between rows that are worth the same; with (seed, place) it is the same whatever the call.
        clusters: for "diversity".
    """
    ties = np.array([_draw(seed, place) for place in rows["added_at"]])
    if policy == "priority":
        return highest(np.asarray(rows["value"], np.float64), size, ties)
    return spread(text_clusters(map(row_text, rows), clusters, seed), size, ties)


def text_clusters(texts: Iterable[str], clusters: int, seed: int) -> np.ndarray:
    """Cluster [N] of each text: k-means over TF-IDF of its words, brought down to `DIMENSIONS` (latent semantics).

    The features come from the text alone, so they mean the same for rows stored years apart by other models. Words
    are hashed: no vocabulary is kept, and texts are read one after another. With fewer different texts than clusters,
    there are fewer clusters.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.preprocessing import normalize

    different: set[bytes] = set()

    def read() -> Iterator[str]:
        for text in texts:
            different.add(hashlib.blake2b(text.encode(), digest_size=8).digest())
            yield text

    count = HashingVectorizer(
        n_features=FEATURES, alternate_sign=False, norm=None, tokenizer=words, token_pattern=None,
        lowercase=False,
    )  # fmt: skip
    features: Any = TfidfTransformer(sublinear_tf=True).fit_transform(count.transform(read()))
    if features.shape[0] > DIMENSIONS:
        features = normalize(TruncatedSVD(DIMENSIONS, random_state=seed).fit_transform(features))
    return kmeans(features, min(clusters, len(different)), seed).labels_


def row_text(row: dict[str, Any]) -> str:
    """The text of a row in one of the trainer's forms, turn after turn."""
    found = []
    for name in ("prompt", "completion", "messages", "text"):
        part = row.get(name)
        turns = [turn.get("content") for turn in part] if isinstance(part, list) else [part]
        found += [text for text in turns if text]
    return "\n".join(found)


def _draw(seed: int, place: int) -> float:
    """A number in [0, 1) for the row that was the `place`-th to come."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") / 2**64
