"""Greedy answers that are given again to the same question."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from retain.experts.asks import Done, Event, Piece, Ticket
from retain.experts.row import COLDEST, Row


class Remembered:
    """The answers given last, by prompt, expert and settings; the one asked longest ago goes first.

    Args:
        most: answers kept; 0 keeps none.
        stamp: tells the weights behind a name from others that had it before (`ExpertLibrary.stamp`).
    """

    def __init__(self, most: int, stamp: Any = lambda name: None) -> None:
        self.most, self.hits, self._stamp = most, 0, stamp
        self._kept: OrderedDict[Any, tuple[Event, ...]] = OrderedDict()

    def find(self, ticket: Ticket) -> tuple[Event, ...] | None:
        """What was said last time."""
        key = self._key(ticket)
        if key not in self._kept:
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, row: Row) -> None:
        """Remember what an ended row has said."""
        if not self.most or not row.greedy:
            return
        text = "".join(event.text for event in row.events if isinstance(event, Piece))
        end = next(event for event in row.events if isinstance(event, Done))
        self._kept[self._key(row.ticket)] = (Piece(text), end) if text else (end,)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)

    def _key(self, ticket: Ticket) -> Any:
        ask, expert = ticket.ask, ticket.choice.expert if ticket.choice else None
        if not self.most or ask.temperature >= COLDEST:
            return None
        weights = None if expert is None else self._stamp(expert)
        return ask.ids, expert, weights, ask.limit, ask.stop
