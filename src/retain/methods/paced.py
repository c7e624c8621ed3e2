"""Settings of how much is replayed, and when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from retain.functional.pacing import Fraction
from retain.functional.sampling import schedule
from retain.methods.base import MethodConfig


class Paced(MethodConfig):
    """How much is replayed, and when."""

    fraction: float | None = Field(None, ge=0, lt=1)
    """Share of replay in what is trained on; 0 is off. Not given: 0.1, with `sources` 0.15, or where the schedule
    starts (linear 0.2, cosine 0.3, rising 0.15). A warm-up reaches it; it is the mean of an annealed share."""
    schedule: Literal["constant", "linear", "cosine", "rising", "warmup", "annealed", "custom"] = "constant"
    """How the share moves over the task. Annealed: all replay comes in the last `part`."""
    end: float | None = Field(None, ge=0, lt=1)
    """Share at the end of a linear (a fifth of the start), cosine (0.1) or rising (0.3) schedule."""
    expression: str | None = None
    """For `custom`: the share as an expression of t in [0, 1], e.g. `0.3 * (1 - t)`."""
    part: float | None = Field(None, gt=0, le=1)
    """Part of the task that a warm-up takes, or in which an annealed schedule replays; 0.2 when not given."""
    every: int | None = Field(None, ge=2)
    """Replay in a block at the end of every so many optimizer steps instead of in each; the share stays."""
    spread: float = Field(0.0, ge=0, lt=1)
    """With `every`: the part of the replay that is spread over all steps; the rest comes in blocks."""
    by: Literal["rows", "tokens"] = "rows"
    """Count the share in rows or in supervised tokens."""

    @property
    def usual(self) -> float:
        """The fraction of a constant share when none is given."""
        return 0.1

    @property
    def share(self) -> Fraction:
        """The share as a function of progress, with the defaults of the schedule."""
        start = self.usual if self.fraction is None and self.schedule == "constant" else self.fraction
        return schedule(self.schedule, start, self.end, self.expression, part=self.part)
