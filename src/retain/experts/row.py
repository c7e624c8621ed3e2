"""A row that is being written: its tokens, its text, its draws."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from retain.experts.asks import Done, Event, Piece, Ticket
from retain.experts.text import TextStream
from retain.models.decoding import draw

#: Below this a temperature is greedy: the most likely token would be drawn anyway.
COLDEST = 1e-3


class Row:
    """An ask while it is answered.

    Args:
        ticket: with its choice made.
        tokenizer: for the text.
    """

    def __init__(self, ticket: Ticket, tokenizer: Any) -> None:
        self.ticket, self.tokens, self.ended = ticket, list[int](), False
        self.events: list[Event] = []
        self._text = TextStream(tokenizer, ticket.ask.stop)
        self._random = torch.Generator().manual_seed(ticket.ask.seed)

    @property
    def expert(self) -> str | None:
        assert self.ticket.choice is not None
        return self.ticket.choice.expert

    @property
    def greedy(self) -> bool:
        return self.ticket.ask.temperature < COLDEST

    def uniform(self) -> torch.Tensor:
        """The row's next random number: of its own generator, so that it does not matter who shares the batch."""
        return torch.rand((), generator=self._random, dtype=torch.float64)

    def push(self, token: int, stops: Collection[int]) -> None:
        """Take over a token, hand on the text, and end where it ends."""
        self.tokens.append(token)
        by_model = token in stops
        self._tell("" if by_model else self._text.push(token))
        over = by_model or len(self.tokens) >= self.ticket.ask.limit
        if over and not self._text.stopped:
            self._tell(self._text.finish())
        if over or self._text.stopped:
            reason = "stop" if by_model or self._text.stopped else "length"
            self.ended = True
            self._hand_on(Done(reason, len(self.tokens)))

    def _tell(self, text: str) -> None:
        if text:
            self._hand_on(Piece(text))

    def _hand_on(self, event: Event) -> None:
        self.events.append(event)
        self.ticket.tell(event)


def next_tokens(rows: Sequence[Row], scores: torch.Tensor) -> list[int]:
    """What every row writes next.

    Args:
        scores: [n, V].
    """
    tokens = scores.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if drawn:
        asks = [rows[i].ticket.ask for i in drawn]
        uniform = torch.stack([rows[i].uniform() for i in drawn]).to(scores.device)
        warm = torch.tensor([ask.temperature for ask in asks], dtype=torch.float32, device=scores.device)
        top_p = torch.tensor([ask.top_p for ask in asks], dtype=torch.float64, device=scores.device)
        place = torch.tensor(drawn, device=scores.device)
        tokens[place] = draw(scores[place].float() / warm[:, None], uniform, top_p)
    return tokens.tolist()
