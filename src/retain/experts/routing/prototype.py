"""Router by likeness: the mean state of every expert's example questions, and the cosine to it.

    score_k = cos(x − m, p_k − m),  p_k = mean of the expert's questions,  m = mean of the p_k and of nobody's questions

Hidden states of a language model share a large common part; without m all cosines would be near 1 (Ethayarajh 2019,
arXiv:1909.00512). Nobody's questions have little in common, so they get no mean of their own but a constant score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retain.experts.routing.base import Labels, Learned, Progress, Router

Reader = Callable[..., NDArray[np.float32]]


class Prototype(Router):
    """Cosine to the mean state of an expert's questions.

    Args:
        reader: texts → vectors [n, H]: `states.StateReader`, or `embedding_reader` of a sentence-transformers model.
        settings: as for `Router`.
    """

    name = "prototype"

    def __init__(self, reader: Reader, **settings: Any):
        super().__init__(**settings)
        self.reader = reader

    def read(self, prompts: Sequence[str], progress: Progress = lambda n: None) -> NDArray[np.float32]:
        return self.reader(prompts, progress)

    def learn(self, rows: NDArray[np.float32], labels: Labels) -> Learned:
        means = np.stack([rows[labels == k].mean(0) for k in range(labels.max() + 1)])
        middle = means.mean(0)
        return {
            "middle": middle,
            "prototypes": unit(means[:-1] - middle),
            "vectors": unit(rows - middle).astype(np.float16),  # of the examples, to find the nearest
        }

    def score(self, learned: Learned, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        cosines = unit(rows - learned["middle"]) @ learned["prototypes"].T
        return np.concatenate([cosines, np.zeros((len(rows), 1))], axis=1).astype(float)

    def explain(self, prompt: str, row: NDArray[np.float32], scores: NDArray[np.float64], expert: int) -> str:
        likeness = self.learned["vectors"].astype(np.float32) @ unit(row - self.learned["middle"])
        return f"most like its question {self.nearest(likeness, expert)} (likeness {scores[expert]:.2f} of 1)"


def unit(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows at length 1; a zero row stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def embedding_reader(model: str) -> Reader:
    """Texts as embeddings [n, E] of a sentence-transformers model (folder or hub id); needs the extra `similarity`."""
    from retain.models.embedding import vectors

    def read(texts: Sequence[str], progress: Progress = lambda n: None) -> NDArray[np.float32]:
        found = vectors(model, texts, "experts route")
        progress(len(texts))
        return found

    return read
