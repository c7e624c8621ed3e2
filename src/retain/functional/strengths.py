"""How strongly weights are pulled: over a task, from the bottom of a model to its top, and by its size.

    raw units         λ_raw on F as estimated, in nats² per token
    normalised units  strength = λ_raw · mean F, on F / mean F

Both are the same pull. In normalised units F has the mean 1 of L2-SP, so that a number means the same on every model,
estimator and batch; numbers of papers and of `recommended` are in raw units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from retain.errors import ConfigError, unknown
from retain.functional.sampling import schedule

#: Where a schedule ends when nothing is said, as a multiple of where it starts.
ENDS = {"linear": 0.2, "cosine": 1 / 3, "rising": 2.0}
KINDS = ("constant", *ENDS, "custom")


class Recommended(NamedTuple):
    """(lowest, highest) strength in raw units."""

    l2sp: tuple[float, float]
    ewc: tuple[float, float]


#: Parameters up to which a row holds. Given for 7–13, 30–70 and from 100 billion; the bounds lie between.
BY_SIZE: tuple[tuple[float, Recommended], ...] = (
    (20e9, Recommended((1e-5, 5e-5), (1e4, 5e4))),
    (85e9, Recommended((5e-6, 1e-5), (5e3, 1e4))),
    (math.inf, Recommended((1e-6, 5e-6), (1e3, 5e3))),
)


def over_task(
    kind: str, start: float, end: float | None = None, expression: str | None = None
) -> Callable[[float], float]:
    """The strength as a function of the progress t in [0, 1] of a task.

    Args:
        kind: constant, linear, cosine, rising, as in `sampling.schedule`; custom is `start` times an expression of t.
        start, end: ≥ 0; without an end the `ENDS` multiple of the start.
        expression: for "custom" only, e.g. `1 - t`.

    Raises:
        ConfigError: unknown kind, a superfluous or missing number, a negative strength, or a bad expression.
    """
    if kind not in KINDS:
        raise ConfigError(unknown("schedule", kind, KINDS))
    if kind == "custom":
        factor = schedule(kind, None, end, expression, below=math.inf)
        return lambda t: start * factor(t)
    end = ENDS[kind] * start if end is None and kind in ENDS else end
    return schedule(kind, start, end, expression, below=math.inf)


def by_height(bottom: float, top: float, height: float) -> float:
    """Factor of a layer, linear between that of the bottom (height 0) and that of the top (height 1).

    Raises:
        ConfigError: a factor that is negative or not finite.
    """
    for number in (bottom, top):
        if not 0 <= number < math.inf:
            raise ConfigError(f"by_layer: {number} given; allowed: two finite numbers ≥ 0, bottom and top.")
    return bottom + (top - bottom) * height


def recommended(parameters: float) -> Recommended:
    """Strengths in raw units for a model of so many parameters; below 7 billion those of 7 to 13 billion.

    A start for a search, not a result: what is right depends on the data and on how F was estimated.
    """
    return next(row for most, row in BY_SIZE if parameters <= most)
