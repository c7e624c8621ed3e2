"""Router by likeness: the mean direction of every expert's example questions, and the cosine to it.

    z = (x − m) / s per dimension,   score_k = cos(z, p_k),   p_k = mean of z / |z| over the expert's questions

with m and s over all questions: without them a few large dimensions that all texts share would decide (Ethayarajh
2019, arXiv:1909.00512). Nobody's questions have little in common, so they get several means, by k-means, and the likest
counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retain.experts.routing.base import Labels, Learned, Progress
from retain.experts.routing.vectors import OnVectors, Reader, unit

#: Means of the questions for nobody.
GROUPS = 4


class Prototype(OnVectors):
    """Cosine to the mean direction of the states of an expert's questions.

    Args:
        reader: texts → vectors [n, H]: `StateReader`, or `embedding_reader` of a sentence-transformers model.
        settings: as for `Router`.
    """

    name = "prototype"

    def learn(self, rows: NDArray[np.float32], labels: Labels) -> Learned:
        from sklearn.cluster import KMeans

        learned: Learned = {"middle": rows.mean(0), "spread": np.maximum(rows.std(0), 1e-6)}
        z = _standard(learned, rows)
        nobody = z[labels == labels.max()]
        means = KMeans(min(GROUPS, len(nobody)), n_init=4, random_state=0).fit(nobody).cluster_centers_
        return learned | {
            "prototypes": unit(np.stack([z[labels == k].mean(0) for k in range(labels.max())])),
            "nobody": unit(means).astype(np.float32),
            "vectors": z.astype(np.float16),  # of the examples, to find the nearest
        }

    def score(self, learned: Learned, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        z = _standard(learned, rows)
        nobody = (z @ learned["nobody"].T).max(1, keepdims=True)
        return np.concatenate([z @ learned["prototypes"].T, nobody], axis=1).astype(float)

    def explain(self, prompt: str, row: NDArray[np.float32], scores: NDArray[np.float64], expert: int) -> str:
        likeness = self.learned["vectors"].astype(np.float32) @ _standard(self.learned, row)
        return (
            f"its nearest question is {self.nearest(likeness, expert)}; likeness to its mean {scores[expert]:.2f} of 1"
        )


def _standard(learned: Learned, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return unit((rows - learned["middle"]) / learned["spread"])


def embedding_reader(model: str) -> Reader:
    """Texts as embeddings [n, E] of a sentence-transformers model (folder or hub id); needs the extra `similarity`."""
    from retain.models.embedding import vectors

    def read(texts: Sequence[str], progress: Progress = lambda n: None) -> NDArray[np.float32]:
        found = vectors(model, texts, "experts route")
        progress(len(texts))
        return found

    return read
