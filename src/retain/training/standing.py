"""What a budget knows from look to look while a model trains, and the drift that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from retain.config import BudgetConfig
from retain.functional import budget as maths

Lost = tuple[float, float]  # in the mean, and at least

_PRIOR_NATS = 1.0  # nats of perplexity per nat of drift: the same on texts that the base wrote


@dataclass
class Standing:
    """What a budget remembers from look to look; the part of its log that a resumed training needs.

    Args:
        step: of the last look.
        drift: seen then, in nats per token.
        limit: which it is held to.
        dual: state of the factor.
        seen: of every look at the probes: drift, loss and its lower end of scores, and of nats; None without such.
        room: what the mean loss may be so that its bound is inside, of scores and in nats; None before any look.
        taken: jumps that were taken back in part.
    """

    step: int = 0
    drift: float = 0.0
    limit: float = 0.0
    dual: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[float, Lost | None, Lost | None]] = field(default_factory=list)
    room: tuple[float | None, float | None] = (None, None)
    taken: int = 0

    def allowed(self, settings: BudgetConfig, kinds: tuple[bool, bool]) -> float:
        """The drift that the budget allows, from what the probes lost so far: the smaller of scores' and nats'.

        Args:
            kinds: whether any probe scores between 0 and 1, and whether any is in nats; both limits hold without any.
        """
        c = settings
        if c.drift is not None:
            return c.drift
        found = []
        for place, (limit, prior) in enumerate(((c.lose_at_most, maths.PRIOR), (c.lose_at_most_nats, _PRIOR_NATS))):
            looks = [(drift, (scores, nats)[place]) for drift, scores, nats in self.seen]
            told = [(drift, lost[0], lost[1]) for drift, lost in looks if lost is not None]
            if told or (not self.seen and (kinds[place] or not any(kinds))):
                found.append(maths.drift_limit(self.room[place] or limit, told, prior))
        return min(found)


def asked_at(times: int, every: int, steps: int) -> set[int]:
    """Steps of the looks at which the probes are asked: spread evenly over a training, without its end."""
    looks = range(every, steps, every)
    return {looks[math.ceil(len(looks) * i / (times + 1)) - 1] for i in range(1, times + 1)} if looks else set()
