"""How alike texts are in meaning: the cosine of their embeddings, by a sentence-transformers model."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

from retain.errors import ConfigError, ModelError


def require_embeddings(where: str) -> None:
    """Refuse to go on without the library.

    Raises:
        ConfigError: sentence-transformers is not installed.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(
            f"{where}: sentence-transformers is not installed. Run pip install 'retain-llm[similarity]', or leave "
            "`embedding` out."
        )


def similarities(model: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Largest cosine between each text and its references, −1 to 1; 0 for a text that is empty.

    Computed on the CPU in float32, so that it takes no memory from a model that is being trained and comes out the same
    wherever that one runs (Reimers and Gurevych 2019, arXiv:1908.10084).

    Args:
        model: folder or hub id of a sentence-transformers model.
        texts: (n) answers.
        references: (n) lists of one or more accepted answers each.

    Raises:
        ConfigError: sentence-transformers is not installed.
        ModelError: the model cannot be loaded.
    """
    require_embeddings("similarity")
    import torch

    encoder = _load(model)
    every = sorted(set(texts) | {one for accepted in references for one in accepted})
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        vectors = encoder.encode(every, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    place = dict(zip(every, vectors.double()))
    return [
        max(float(place[text] @ place[one]) for one in accepted) if text.strip() else 0.0
        for text, accepted in zip(texts, references)
    ]


def vectors(model: str, texts: Sequence[str], where: str) -> Any:
    """Embeddings [n, E] of texts, at length 1, float32 on the CPU; as a numpy array.

    Args:
        where: what an error begins with.

    Raises:
        ConfigError: sentence-transformers is not installed.
        ModelError: the model cannot be loaded.
    """
    require_embeddings(where)
    return _load(model).encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


@functools.lru_cache(maxsize=1)
def _load(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(model, device="cpu").float()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"embedding: '{model}' cannot be loaded ({first}). Give a folder or a hub id of a sentence-transformers "
            "model."
        ) from error
