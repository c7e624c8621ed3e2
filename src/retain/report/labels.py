"""Where the names of points stand in a picture: beside their point, over nothing else, no doubt whose they are.

Everything is in typographic points, so that sizes of text and distances are of one kind. A box is its lower left
and upper right corner, (2, 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

#: Where a label may stand: how far from its point, and in which directions (degrees).
REACH, AROUND = (7, 13, 21, 32, 46, 62), (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200)
#: A label that is further than this from its point is joined to it by a line.
JOINED = 11
POINT, LINE = 6, 2  # half of what a point and a line take, with some air

Array = NDArray[np.float64]


def place(spots: Array, sizes: Array, lines: Sequence[Array], inside: Array, rounds: int = 3) -> Array:
    """Boxes of the labels, in the order of the points: (n, 2, 2).

    Every label in turn takes the place that costs least, given where the others are; after three rounds they rest.

    Args:
        spots: (n, 2), the points.
        sizes: (n, 2), width and height of the labels.
        lines: (2, 2) each, start and end of a level or upright line that labels should not cover.
        inside: the box that they should not leave.
    """
    taken = np.array(
        [[spot - POINT, spot + POINT] for spot in spots]
        + [[np.min(line, 0) - LINE, np.max(line, 0) + LINE] for line in lines]
    )

    def box_at(i: int, reach: float, degrees: float) -> Array:
        way = np.round([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], 6)
        corner = spots[i] + reach * way - (1 - np.sign(way)) / 2 * sizes[i]
        return np.array([corner, corner + sizes[i]])

    def cost(i: int, reach: float, box: Array) -> float:
        others = np.arange(len(spots)) != i
        covered = shared(box, taken).sum() + 2 * shared(box, boxes[others]).sum()
        outside = sizes[i].prod() - shared(box, inside)
        mine = distance(box, spots[i])
        if mine > JOINED:  # its line must not run through another label or point
            dots = np.linspace(spots[i], nearest(box, spots[i]), 20)[:, None]
            through = np.linalg.norm(dots - spots[others], axis=-1) < POINT
            wrong = through.sum() + (distance(boxes[others], dots) == 0).sum()
        else:  # it must not seem to belong to another point
            wrong = 5 * (distance(box, spots[others]) < 1.5 * mine).sum()
        return float(covered + 4 * outside + reach + 40 * wrong)

    boxes = np.array([box_at(i, REACH[0], AROUND[0]) for i in range(len(spots))])
    for _ in range(rounds):
        for i in range(len(spots)):
            boxes[i] = box_at(i, *min(product(REACH, AROUND), key=lambda at: cost(i, at[0], box_at(i, *at))))
    return boxes


def nearest(box: Array, spot: Array) -> Array:
    """The point of a box (…, 2, 2) that is nearest to a spot (…, 2)."""
    return np.clip(spot, box[..., 0, :], box[..., 1, :])


def distance(box: Array, spot: Array) -> Array:
    """From a spot to the nearest point of a box; 0 inside it."""
    return np.linalg.norm(nearest(box, spot) - spot, axis=-1)


def shared(a: Array, b: Array) -> Array:
    """Area that boxes have in common."""
    sides = np.minimum(a[..., 1, :], b[..., 1, :]) - np.maximum(a[..., 0, :], b[..., 0, :])
    return np.clip(sides, 0, None).prod(-1)
