"""The engine's thread: before every step of the batch rows come in and go out.

A row waits, is routed if it asks for that, has its prompt read together with others of like length, and joins the
running batch; it leaves when it has ended or is cancelled. Rows of different experts share the batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

import torch

from retain.errors import ModelError, RetainError
from retain.experts.asks import AUTO, Failed, Stopping, Ticket, named
from retain.experts.batch import Batch
from retain.experts.remembered import Remembered
from retain.experts.row import Row, next_tokens
from retain.models.generation import stop_tokens
from retain.models.rows import looking

log = logging.getLogger(__name__)


class Loop:
    """What runs and what waits. Only its own thread touches the model; `waiting` is shared, under `wake`.

    Args:
        pool, tokenizer, router, rows, batch_tokens, read_tokens, remember: as of `Engine`.
    """

    def __init__(
        self, pool: Any, tokenizer: Any, router: Any, rows: int, batch_tokens: int, read_tokens: int, remember: int
    ) -> None:
        self.pool, self.tokenizer, self.router = pool, tokenizer, router
        self.rows, self.batch_tokens, self.read_tokens = rows, batch_tokens, read_tokens
        self.wake, self.stopping, self.give_up = threading.Condition(), False, False
        self.waiting: deque[Ticket] = deque()
        self.running: list[Row] = []
        self.remembered = Remembered(remember, pool.library.stamp)
        self.pace = 1.0  # seconds per answer, a moving mean
        self._batch = Batch(pool.model)
        self._stops = frozenset(stop_tokens(pool.model, tokenizer))
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def run(self) -> None:
        """Answer until told to stop."""
        try:
            with looking(self.pool.model):
                while self._more():
                    self._let_go()
                    self._admit()
                    self._step()
        finally:  # also when the engine itself has failed: nobody waits for ever
            with self.wake:
                self.stopping = True
                left = [*(row.ticket for row in self.running), *self.waiting]
                self.running, self._batch = [], Batch(self.pool.model)
                self.waiting.clear()
            for ticket in left:
                ticket.tell(Failed(Stopping("The server has stopped before the answer was there. Ask again.")))

    def _more(self) -> bool:
        """Wait for something to do; whether there is."""
        with self.wake:
            while not self.waiting and not self.running and not self.stopping:
                self.wake.wait()
            return not self.give_up and bool(self.waiting or self.running)

    def _missing(self, expert: str | None) -> bool:
        """Whether an expert cannot be used any more, such as one that was removed while it answered."""
        try:
            self.pool.ensure([expert])
        except RetainError:
            return True
        return False

    @staticmethod
    def _fail(ticket: Ticket, error: Exception) -> None:
        if not isinstance(error, RetainError):
            log.error("an answer failed", exc_info=error)
            error = ModelError(f"The model failed ({type(error).__name__}). The server's log says more.")
        ticket.tell(Failed(error))

    def _let_go(self) -> None:
        """Rows and asks of which nobody waits for the answer any more."""
        with self.wake:
            for ticket in [ticket for ticket in self.waiting if ticket.cancelled]:
                self.waiting.remove(ticket)
        for row in self.running:
            row.ended = row.ticket.cancelled
        self._leave()

    def _leave(self) -> None:
        """Ended rows leave the batch."""
        staying = [i for i, row in enumerate(self.running) if not row.ended]
        if len(staying) < len(self.running):
            self._batch.keep(staying)
            self.running = [self.running[i] for i in staying]

    def _admit(self) -> None:
        """Take in what there is room for: choose experts, give what is remembered, read the prompts of the others."""
        self._route()
        rows: list[Row] = []
        while (ticket := self._next(rows)) is not None:
            assert ticket.choice is not None
            ticket.tell(ticket.choice)
            if (known := self.remembered.find(ticket)) is not None:
                for event in known:
                    ticket.tell(event)
                continue
            rows.append(Row(ticket, self.tokenizer))
        for group in _like_lengths(rows):
            try:
                batch = Batch(self.pool.model)
                with self.pool.rows([row.expert for row in group]):
                    scores = batch.read([row.ticket.ask.ids for row in group], self._pad)
                self._write(group, scores)
                batch.keep([i for i, row in enumerate(group) if not row.ended])
                self._batch.join(batch)
            except Exception as error:
                for row in group:
                    self._fail(row.ticket, error)
            else:
                self.running.extend(row for row in group if not row.ended)

    def _route(self) -> None:
        """Choices for everything at the head of the queue that may be taken in now; one call for all of them."""
        with self.wake:
            heads = [t for t in list(self.waiting)[: max(0, self.rows - len(self.running))] if t.choice is None]
        asking = [ticket for ticket in heads if ticket.ask.expert == AUTO]
        for ticket in heads:
            if ticket.ask.expert != AUTO:
                ticket.choice = named(ticket.ask.expert)
        if not asking:
            return
        try:
            with self.pool.lock:
                self.pool.activate(None)
                choices = self.router.route([ticket.ask.question for ticket in asking])
        except Exception as error:
            with self.wake:
                for ticket in asking:
                    self.waiting.remove(ticket)
            for ticket in asking:
                self._fail(ticket, error)
            return
        for ticket, choice in zip(asking, choices, strict=True):
            ticket.choice = choice

    def _next(self, rows: list[Row]) -> Ticket | None:
        """The next of the queue, when it fits beside what runs and `rows`; its expert is then in memory."""
        while self.waiting:
            ticket = self.waiting[0]
            if ticket.choice is None:
                return None
            beside = [*self.running, *rows]
            needs = [row.ticket.ask.need for row in beside] + [ticket.ask.need]
            read = sum(len(row.ticket.ask.ids) for row in rows) + len(ticket.ask.ids)
            full = len(needs) > self.rows or len(needs) * max(needs) > self.batch_tokens
            if beside and (full or (rows and read > self.read_tokens)):
                return None
            experts = {row.expert for row in beside} | {ticket.choice.expert}
            try:
                if beside and not self.pool.fits(experts) and self.pool.fits([ticket.choice.expert]):
                    return None
                self.pool.ensure(experts if self.pool.fits(experts) else [ticket.choice.expert])
            except Exception as error:
                if beside and isinstance(error, RetainError) and not self._missing(ticket.choice.expert):
                    return None  # it is about one that is running, and is told there
                self._fail(self._take(ticket), error)
                continue
            return self._take(ticket)
        return None

    def _take(self, ticket: Ticket) -> Ticket:
        with self.wake:
            self.waiting.remove(ticket)
        return ticket

    def _step(self) -> None:
        """One more token for every running row."""
        if not self.running:
            return
        try:
            with self.pool.rows([row.expert for row in self.running]):
                scores = self._batch.step([row.tokens[-1] for row in self.running])
            self._write(self.running, scores)
        except Exception as error:
            gone = [row for row in self.running if self._missing(row.expert)] if isinstance(error, RetainError) else []
            for row in gone or self.running:
                self._fail(row.ticket, error)
                row.ended = True
        self._leave()

    def _write(self, rows: list[Row], scores: torch.Tensor) -> None:
        for row, token in zip(rows, next_tokens(rows, scores)):
            row.push(token, self._stops)
            if row.ended:
                self.pace += 0.1 * (time.monotonic() - row.ticket.came - self.pace)
                self.remembered.keep(row)


def _like_lengths(rows: list[Row]) -> list[list[Row]]:
    """Groups in which no prompt is more than twice as long as another: what is padded is computed as well."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.ticket.ask.ids)):
        if groups and len(row.ticket.ask.ids) <= 2 * len(groups[-1][0].ticket.ask.ids):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
