"""A conversation with experts: what was said, who is to answer, and why it was them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retain.errors import ConfigError
from retain.experts.asks import AUTO, Ask, Event, Piece
from retain.experts.choice import Choice
from retain.experts.engine import Engine
from retain.models.generation import encode_prompts

HELP = """/expert NAME   this expert answers          /base   the base answers      /auto   the router chooses
/why           why the last one answered    /new    forget what was said  /quit   end"""


class Conversation:
    """Turns with one engine.

    Args:
        engine: started.
        limit: most new tokens per answer.
        settings: temperature, top_p and seed of the asks.
    """

    def __init__(self, engine: Engine, limit: int = 512, **settings: Any) -> None:
        self.engine, self.limit, self.settings = engine, limit, settings
        self.expert: str | None = AUTO if engine.router is not None else None
        self.last: Choice | None = None
        self.said: list[dict[str, str]] = []

    def command(self, line: str) -> str:
        """Carry out a line that begins with "/"; what there is to say about it.

        Raises:
            ConfigError: no such command or expert.
            EOFError: /quit.
        """
        word, _, rest = line.partition(" ")
        if word == "/quit":
            raise EOFError
        if word == "/expert":
            self.engine.pool.library.path(rest.strip())
            self.expert = rest.strip()
            return f"{self.expert} answers."
        if word == "/base":
            self.expert = None
            return "The base answers."
        if word == "/auto":
            if self.engine.router is None:
                raise ConfigError("/auto: there is no router here. Use /expert NAME or /base.")
            self.expert = AUTO
            return "The router chooses."
        if word == "/why":
            return explained(self.last) if self.last else "Nobody has answered yet."
        if word == "/new":
            self.said = []
            return "A new conversation."
        if word == "/help":
            return HELP
        raise ConfigError(f"{word}: no such command.\n{HELP}")

    def ask(self, text: str) -> Iterator[Event]:
        """The answer, as it comes; the turn is kept when it is whole, or as far as it came.

        Raises:
            ConfigError: the question alone is longer than the model's context.
            RetainError: as `Engine.stream`.
        """
        turn = {"role": "user", "content": text}
        ids = self._fitting(turn)
        limit = min(self.limit, self.engine.context - len(ids))
        answer = ""
        try:
            for event in self.engine.stream(Ask(tuple(ids), self.expert, text, max(limit, 1), **self.settings)):
                if isinstance(event, Choice):
                    self.last = event
                elif isinstance(event, Piece):
                    answer += event.text
                yield event
        finally:
            if answer:
                self.said += [turn, {"role": "assistant", "content": answer}]

    def _fitting(self, turn: dict[str, str]) -> list[int]:
        """Tokens of the conversation with a new turn; the oldest ones are left out where it has become too long."""
        room = self.engine.context - min(self.limit, self.engine.context // 2)
        while True:
            ids = encode_prompts(self.engine.tokenizer, [[*self.said, turn]])[0]
            if len(ids) <= room or not self.said:
                return ids
            self.said = self.said[2:]


def name_of(choice: Choice) -> str:
    """Who answers: the expert, or "base"."""
    return choice.expert or "base"


def explained(choice: Choice) -> str:
    """A choice in words: who, how sure, why, and who else was near."""
    others = sorted(choice.scores.items(), key=lambda pair: -pair[1])
    near = ", ".join(f"{name} {score:.0%}" for name, score in others[:4])
    return f"{name_of(choice)}, {choice.confidence:.0%} sure: {choice.why}" + (f" ({near})" if near else "")
