"""Routers that read a question as a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retain.experts.routing.base import Progress, Router

#: Texts, and a function that is told how many were read → vectors [n, H].
Reader = Callable[..., NDArray[np.float32]]


class OnVectors(Router):
    """A router on what a reader makes of questions.

    Args:
        reader: texts → vectors [n, H]: `StateReader`, or `embedding_reader` of a sentence-transformers model.
        settings: as for `Router`.
    """

    def __init__(self, reader: Reader, **settings: Any):
        super().__init__(**settings)
        self.reader = reader

    def read(self, prompts: Sequence[str], progress: Progress = lambda n: None) -> NDArray[np.float32]:
        return self.reader(prompts, progress)


def unit(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows at length 1; a zero row stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
