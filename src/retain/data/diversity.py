"""A diverse subset of texts: k-means over what they are about, then rows of every cluster in turn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Chosen(NamedTuple):
    """Places of the chosen rows, the cluster of every row, and the clusters with a chosen row out of all."""

    places: np.ndarray
    labels: np.ndarray
    covered: int
    clusters: int


def tfidf(texts: Sequence[str]) -> Any:
    """TF-IDF of words and pairs of words, rows at length 1; sparse [n, F]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # words of one letter and figures count, so that no text is empty
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]")
    return words.fit_transform(texts)


def kmeans(features: Any, clusters: int, seed: int) -> Any:
    """scikit-learn's `KMeans`, fitted; the best of four starts. Fewer different rows give fewer clusters."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
        return KMeans(n_clusters=max(1, clusters), n_init=4, random_state=seed).fit(features)


def diverse(features: Any, number: int, clusters: int, seed: int) -> Chosen:
    """Choose rows so that every cluster is there, each with the rows nearest to its centre first.

    Rows are taken one from each cluster in turn, the largest cluster first: of C ≤ number clusters all are covered,
    and no cluster gives more than one row above another that still has some.

    Args:
        features: [n, F], dense or sparse.
        number: rows wanted.
        clusters: most clusters; there are never more than rows wanted or different rows.
        seed: of the starting centres.
    """
    rows = features.shape[0]
    number = min(number, rows)
    model = kmeans(features, min(clusters, number), seed)
    labels = model.labels_
    distance = model.transform(features)[np.arange(rows), labels]
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    queues = [list(m[np.lexsort((m, distance[m]))]) for m in sorted(members, key=lambda m: (-len(m), m[0]))]
    places: list[int] = []
    while len(places) < number:
        places += [int(queue.pop(0)) for queue in queues if queue][: number - len(places)]
    return Chosen(np.array(places), labels, len(np.unique(labels[places])), len(members))
