"""What advice goes by: the model, the rows, what may be kept, what is there to compute with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retain.errors import ConfigError, unknown

Serve = Literal["any", "adapters", "merged"]
Closeness = Literal["near", "middle", "far"]
Room = Literal["plenty", "enough", "little", "half", "quantised", "none"]

SERVE = ("any", "adapters", "merged")
#: Bytes per parameter while training: weights, gradients, two moments and the start of full fine-tuning in float32;
#: weights alone in float32, bfloat16 and 4 bits, which adapters are small beside.
FULL, FROZEN, HALF, QUARTER = 20.0, 4.0, 2.0, 0.65
#: Activations and the libraries, beside what grows with the parameters: a share of it, and GB.
BESIDE, LIBRARIES = 1.2, 1.0
#: Similarity from which on rows are near, and below which they are far (the bands of the freeze shares).
NEAR, FAR = 0.8, 0.5


@dataclass(frozen=True)
class Scenario:
    """One situation.

    Args:
        parameters: of the base model.
        similarity: of the new rows to what the model knows, 0 to 1 (`retain.advice.similarity`).
        old: whether there are rows that stand for old data.
        private: whether no text of the rows may be written to the run directory.
        memory: GB (10⁹ bytes) that training may take.
        tasks: to be learned in all, those to come later included.
        serve: how the result will be used: adapters beside a base, one merged model, or either.
        lose_at_most: budget of old abilities, as a share (0.01 is one point); None for none.
        rows: of the smallest task.
        longest: tokens of a row that only one in a hundred exceeds.

    Raises:
        ConfigError: a number that cannot be.
    """

    parameters: float
    similarity: float = 0.65
    old: bool = False
    private: bool = False
    memory: float = 16.0
    tasks: int = 1
    serve: Serve = "any"
    lose_at_most: float | None = None
    rows: int = 1000
    longest: int = 256

    def __post_init__(self) -> None:
        checks = {
            "parameters": (self.parameters > 0, "above 0"),
            "similarity": (0 <= self.similarity <= 1, "0 to 1"),
            "memory": (self.memory > 0, "above 0 GB"),
            "tasks": (self.tasks >= 1, "1 or more"),
            "lose_at_most": (self.lose_at_most is None or 0 < self.lose_at_most < 1, "above 0 and below 1"),
            "rows": (self.rows >= 1, "1 or more"),
            "longest": (self.longest >= 1, "1 or more"),
        }
        for name, (fine, allowed) in checks.items():
            if not fine:
                raise ConfigError(f"advise: {name} is {getattr(self, name):g}. Allowed: {allowed}.")
        if self.serve not in SERVE:
            raise ConfigError(unknown("advise: serve", self.serve, SERVE))

    @property
    def closeness(self) -> Closeness:
        """How far the rows are from what the model knows."""
        return "near" if self.similarity > NEAR else "middle" if self.similarity >= FAR else "far"

    def needed(self, bytes_per_parameter: float) -> float:
        """GB that a training takes, roughly, by what it holds of every parameter."""
        return BESIDE * bytes_per_parameter * self.parameters / 1e9 + LIBRARIES

    @property
    def room(self) -> Room:
        """What fits: full fine-tuning twice or once, adapters on float32, bfloat16 or 4-bit weights, or nothing."""
        if self.memory >= 2 * self.needed(FULL):
            return "plenty"
        if self.memory >= self.needed(FULL):
            return "enough"
        if self.memory >= self.needed(FROZEN):
            return "little"
        if self.memory >= self.needed(HALF):
            return "half"
        return "quantised" if self.memory >= self.needed(QUARTER) else "none"

    @property
    def short(self) -> bool:
        """Whether a pass over the rows is a short run: below 200 steps of 8."""
        return self.rows < 1600
