"""What is asked of the engine, and what it says: plain values, one thread's to the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from retain.errors import RetainError
from retain.experts.choice import Choice

#: As an expert: let the router choose.
AUTO = "auto"


class Busy(RetainError):
    """The queue is full. `wait`: seconds after which there may be room."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


class Stopping(RetainError):
    """The engine takes nothing new, or has given up what was left."""


@dataclass(frozen=True)
class Ask:
    """One prompt to be continued.

    Args:
        ids: tokens of the prompt, at least one.
        expert: a name, None for the base, or `AUTO`.
        question: what the router reads, with `AUTO`.
        limit: most new tokens.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the sampling: the same seed draws the same answer, whoever shares the batch (up to rounding).
        stop: strings that end the answer and are not part of it.
    """

    ids: tuple[int, ...]
    expert: str | None = None
    question: str = ""
    limit: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @property
    def need(self) -> int:
        """Slots in the cache that it may fill."""
        return len(self.ids) + self.limit


@dataclass(frozen=True)
class Piece:
    """Text that was written. It may be of several tokens, but holds whole characters only."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end: "stop" (by the model, or at a stop string) or "length"; `tokens` were written, the last included."""

    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The end, without an answer."""

    error: Exception


#: In this order: one Choice, any number of Pieces, one Done; or a Failed at any time.
Event = Choice | Piece | Done | Failed


@dataclass(eq=False)
class Ticket:
    """An ask on its way. `deliver` is called in the engine's thread and must return at once."""

    ask: Ask
    deliver: Callable[[Event], None]
    came: float = field(default_factory=time.monotonic)
    choice: Choice | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits any more: the row leaves the batch, or the queue, at the next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        """Hand on what happened; a listener that is gone cancels."""
        if self.cancelled:
            return
        try:
            self.deliver(event)
        except Exception:  # such as a closed event loop: its owner has left
            self.cancel()


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    reason: str
    tokens: int
    choice: Choice


def named(expert: str | None) -> Choice:
    """The choice of an expert that was asked for by its name."""
    return Choice(expert, 1.0, {}, "asked for by name", 0.0)
