"""An own share of the way back for every group of layers: a coordinate search on the control half of the items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

#: How far a group's share is moved.
STEP = 0.3

Alphas = dict[str, float]


def neighbours(alphas: Mapping[str, float], group: str, step: float = STEP) -> Iterator[Alphas]:
    """The same with one group nearer to the base, then nearer to the tuned model; shares stay between 0 and 1."""
    for change in (-step, step):
        share = round(min(1.0, max(0.0, alphas[group] + change)), 6)
        if share != alphas[group]:
            yield {**alphas, group: share}


def coordinates(
    start: Mapping[str, float], worth: Callable[[Alphas], tuple[float, ...]], most: int, step: float = STEP
) -> tuple[Alphas, int]:
    """Group after group takes a neighbour that is better, until none is; at most `most` points are tried.

    A pass over all groups follows the other until one changes nothing. The groups come in their order in `start`.

    Args:
        start: group → share to begin with.
        worth: larger is better; compared as tuples are. It is asked about every point once.
        most: points that may be asked about, besides the first.
        step: how far a share is moved.

    Returns:
        The best shares, and how many points were asked about besides the first.
    """
    best = dict(start)
    known = {tuple(best.values()): worth(best)}
    moved = True
    while moved:
        moved = False
        for group in start:
            for other in neighbours(best, group, step):
                key = tuple(other.values())
                if key in known:
                    continue
                if len(known) > most:
                    return best, len(known) - 1
                known[key] = worth(other)
                if known[key] > known[tuple(best.values())]:
                    best, moved = other, True
                    break
    return best, len(known) - 1
