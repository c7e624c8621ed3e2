"""Answers for many at once: one thread owns the model, and every step of the batch lets rows in and out (`loop`)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from retain.errors import ConfigError
from retain.experts.asks import AUTO, Answer, Ask, Busy, Done, Event, Failed, Piece, Stopping, Ticket
from retain.experts.batch import check_model
from retain.experts.choice import Choice
from retain.experts.loop import Loop
from retain.models.likelihood import context_length
from retain.models.params import causal


class Engine:
    """Greedy and sampled answers of a base and its experts.

    A greedy answer depends on the prompt and the expert alone, a sampled one on the seed as well, up to rounding
    between batch shapes.

    Args:
        pool: the base and its experts (`AdapterPool`).
        tokenizer: of the base.
        router: for asks with `AUTO`; None refuses them.
        rows: most rows in the batch.
        waiting: most asks in the queue.
        batch_tokens: slots of the cache, rows × the longest row's prompt and limit.
        read_tokens: tokens of prompts that are read between two steps; a longer prompt is read alone.
        remember: greedy answers kept to be given again; 0 keeps none.

    Raises:
        ModelError: a model whose rows cannot come and go.
    """

    def __init__(
        self,
        pool: Any,
        tokenizer: Any,
        router: Any = None,
        rows: int = 8,
        waiting: int = 64,
        batch_tokens: int = 16384,
        read_tokens: int = 2048,
        remember: int = 0,
    ) -> None:
        check_model(pool.model)
        self.pool, self.tokenizer, self.router = pool, tokenizer, router
        self.rows, self.most_waiting = rows, waiting
        self.context = context_length(pool.model, tokenizer)
        self.vocabulary = causal(pool.model).get_input_embeddings().weight.shape[0]
        self._loop = Loop(pool, tokenizer, router, rows, batch_tokens, read_tokens, remember)
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Asks in the queue."""
        return len(self._loop.waiting)

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._loop.running)

    @property
    def remembered(self) -> int:
        """Answers that were given from memory."""
        return self._loop.remembered.hits

    @property
    def alive(self) -> bool:
        """Whether asks are taken and answered."""
        return self._thread is not None and self._thread.is_alive() and not self._loop.stopping

    def start(self) -> Engine:
        """Begin to answer."""
        self._thread = threading.Thread(target=self._loop.run, name="retain-engine", daemon=True)
        self._thread.start()
        return self

    def submit(self, ask: Ask, deliver: Callable[[Event], None]) -> Ticket:
        """Put an ask into the queue; what happens to it is delivered in the engine's thread.

        Raises:
            ConfigError: it cannot be answered: no such expert, no router, or longer than the model's context.
            Busy: the queue is full.
            Stopping: the engine takes nothing new.
        """
        self.check(ask)
        ticket = Ticket(ask, deliver)
        with self._loop.wake:
            if not self.alive:
                raise Stopping("The server is stopping. Ask another one, or later.")
            if self.waiting >= self.most_waiting:
                wait = max(1.0, self._loop.pace * self.waiting / self.rows)
                raise Busy(f"{self.waiting} requests are waiting, which is the most. Try again later.", wait)
            self._loop.waiting.append(ticket)
            self._loop.wake.notify()
        return ticket

    def check(self, ask: Ask) -> None:
        """Raises ConfigError where an ask could never be answered."""
        if ask.expert == AUTO and self.router is None:
            raise ConfigError("model: 'auto' given, and there is no router. Name an expert, or `base`.")
        if ask.expert not in (None, AUTO):
            self.pool.library.path(ask.expert)
        if not ask.ids:
            raise ConfigError("prompt: no tokens. Ask something.")
        if not (ask.limit >= 1 and ask.need <= self.context):
            raise ConfigError(
                f"max_tokens: {len(ask.ids)} tokens of the prompt and {ask.limit} new ones given; the model's context "
                f"is {self.context} tokens. Shorten the prompt, or ask for less."
            )

    def stream(self, ask: Ask) -> Iterator[Event]:
        """Everything that happens to an ask, as it happens; closing the iterator cancels it.

        Raises:
            ConfigError, Busy, Stopping: as `submit`. What fails later raises as well.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.submit(ask, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.cancel()

    def answer(self, ask: Ask) -> Answer:
        """The whole answer.

        Raises:
            as `stream`.
        """
        text, choice = "", None
        for event in self.stream(ask):
            if isinstance(event, Choice):
                choice = event
            elif isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Done):
                assert choice is not None
                return Answer(text, event.reason, event.tokens, choice)
        raise AssertionError("unreachable")

    def stop(self, seconds: float = 0.0) -> None:
        """Take nothing new, finish what is there within so many seconds, give up the rest."""
        with self._loop.wake:
            self._loop.stopping = True
            self._loop.wake.notify()
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))
            self._loop.give_up = True
            self._thread.join()
