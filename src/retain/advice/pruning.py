"""When a trial of a search is hopeless: behind a finished one beyond doubt, in both numbers, at the same point.

    at a point p: learned_x.high < learned_y.low  and  lost_x.low > lost_y.high        for one finished trial y

A point is the end of a task of a sequence, or a look of the monitor at a step of a task; only the numbers of the same
point are set against each other. The intervals must not touch in either number, so that what the drawing of items may
explain ends nothing. The rule takes for granted that who is behind in both at a point stays behind in both. Looks are
left out where the weights move after the training (`interpolate`, a budget): they do not see it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from retain.config import RunConfig
from retain.methods import build
from retain.methods.base import Method
from retain.results import Estimate


@dataclass(frozen=True)
class Point:
    """What a trial had learned and lost at some point, and after how many optimizer steps in all."""

    learned: Estimate
    lost: Estimate
    steps: int

    def dump(self) -> dict[str, Any]:
        """As plain values."""
        return {"learned": self.learned.model_dump(), "lost": self.lost.model_dump(), "steps": self.steps}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Point:
        """What `dump` gave."""
        return cls(Estimate(**values["learned"]), Estimate(**values["lost"]), int(values["steps"]))


class Hopeless(Exception):
    """A trial is ended early: behind the finished trial `by` at `point`, after `steps` optimizer steps in all."""

    def __init__(self, by: int, point: str, steps: int) -> None:
        super().__init__(f"at the {point} it had learned less and lost more than trial {by} had, beyond doubt")
        self.by, self.point, self.steps = by, point, steps


def behind(mine: Point, theirs: Point) -> bool:
    """Whether the first learned less and lost more than the second, beyond doubt: no interval touches the other's."""
    return mine.learned.high < theirs.learned.low and mine.lost.low > theirs.lost.high


def beaten_by(mine: Point, finished: Iterable[tuple[int, Point | None]]) -> int | None:
    """Number of the first finished trial that it is `behind`; None where there is none.

    Args:
        finished: number and, at the same point, the numbers of finished trials; None where they have none.
    """
    return next((number for number, theirs in finished if theirs is not None and behind(mine, theirs)), None)


def looks_count(config: RunConfig) -> bool:
    """Whether what a look of the monitor sees is what a training ends with: nothing moves the weights afterwards."""
    later = [method for method in build(config.methods) if type(method).finish_model is not Method.finish_model]
    return config.budget is None and not any(method.active for method in later)
