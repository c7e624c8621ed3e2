"""How much of a model to freeze, by its size and by how much the new data is like what it knows: rules of thumb."""

from __future__ import annotations

SMALLEST = 1e9  # parameters from which on there is a recommendation
#: (parameters up to which a row holds, shares for a similarity above 0.8, from 0.5 on, and below). Models called "7B"
#: have up to 7.7e9.
_TABLE: tuple[tuple[float, tuple[tuple[float, float], ...]], ...] = (
    (8e9, ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8))),
    (30e9, ((0.7, 0.8), (0.8, 0.9), (0.85, 0.95))),
    (float("inf"), ((0.8, 0.9), (0.9, 0.95), (0.95, 0.99))),
)


def recommended_share(parameters: float, similarity: float) -> tuple[float, float]:
    """(lowest, highest) recommended share of layers to freeze; below `SMALLEST` that of the smallest size.

    Args:
        parameters: of the whole model.
        similarity: of new and old data, from 0 to 1.
    """
    row = next(shares for most, shares in _TABLE if parameters <= most)
    return row[0 if similarity > 0.8 else 1 if similarity >= 0.5 else 2]
