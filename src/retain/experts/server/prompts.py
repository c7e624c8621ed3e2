"""Requests into asks: names into experts, messages and texts into tokens, limits into numbers."""

from __future__ import annotations

import copy
import secrets
import threading
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from retain.experts.asks import AUTO, Ask
from retain.experts.server.errors import ApiError
from retain.experts.server.shapes import Asked, ChatAsked, TextAsked
from retain.models.generation import encode_prompts

BASE = "base"


class Names:
    """What may stand as `model` in a request.

    Args:
        library: of experts.
        base: the base model, as the library calls it.
        routed: whether there is a router.
    """

    def __init__(self, library: Any, base: str, routed: bool) -> None:
        self.library, self.base, self.routed = library, base, routed

    @property
    def own(self) -> str:
        """The base's own name, without its folders."""
        return Path(self.base).name or self.base

    def has(self, model: str) -> bool:
        """Whether a name means an expert or the base."""
        return model in self.library or model in (BASE, self.base, self.own)

    def __call__(self, model: str) -> str | None:
        """The expert that is meant: its name, None for the base, or `AUTO`.

        Raises:
            ApiError: 404, there is none.
        """
        if model == AUTO and self.routed:
            return AUTO
        if self.has(model):
            return model if model in self.library else None
        known = [*([AUTO] if self.routed else []), BASE, *self.library.names()]
        raise ApiError(
            404, f"model: '{model}' given; there is {', '.join(known)}.", param="model", code="model_not_found"
        )

    @staticmethod
    def shown(expert: str | None) -> str:
        """How an answer calls who wrote it."""
        return BASE if expert is None else expert


class Prompts:
    """Makes asks of requests.

    Args:
        tokenizer: of the base. A copy is used: a fast tokenizer may not be called by two threads at once.
        names: what may be asked.
        most: new tokens that a request may ask for; also what it gets when it does not say, where there is room.
        context: of the model, in tokens.
        vocabulary: number of tokens that the model knows.
    """

    def __init__(self, tokenizer: Any, names: Names, most: int, context: int, vocabulary: int) -> None:
        self.names, self.most, self.context, self.vocabulary = names, most, context, vocabulary
        self._tokenizer, self._lock = copy.deepcopy(tokenizer), threading.Lock()

    async def chat(self, asked: ChatAsked) -> list[Ask]:
        """One ask per answer.

        Raises:
            ApiError: no such model, a chat that the model's template refuses, or limits that are too high.
        """
        expert = self.names(asked.model)
        messages = [message.plain for message in asked.messages]
        ids = (await run_in_threadpool(self._encode, [messages]))[0]
        return self._asks(asked, expert, [(ids, asked.question)])

    async def text(self, asked: TextAsked) -> list[Ask]:
        """One ask per prompt and answer.

        Raises:
            ApiError: no such model, a token that the model does not know, or limits that are too high.
        """
        expert = self.names(asked.model)
        given = asked.prompts
        if strange := [t for prompt in given if not isinstance(prompt, str) for t in prompt if t >= self.vocabulary]:
            raise ApiError(
                400, f"prompt: token {strange[0]} given; the model has {self.vocabulary}, from 0 on.", param="prompt"
            )
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        encoded = iter(await run_in_threadpool(self._encode, texts))
        pairs = []
        for prompt in given:
            if isinstance(prompt, str):
                pairs.append((next(encoded), prompt))
            else:
                question = await run_in_threadpool(self._decode, prompt) if expert == AUTO else ""
                pairs.append((prompt, question))
        return self._asks(asked, expert, pairs)

    def _encode(self, prompts: list[Any]) -> list[list[int]]:
        try:
            with self._lock:
                return encode_prompts(self._tokenizer, prompts)
        except Exception as error:  # templates raise what they like, for instance on the order of roles
            raise ApiError(
                400,
                f"messages: the model's chat template refuses them ({error}).",
                param="messages",
                code="invalid_value",
            ) from error

    def _decode(self, ids: list[int]) -> str:
        with self._lock:
            return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _asks(self, asked: Asked, expert: str | None, prompts: list[tuple[list[int], str]]) -> list[Ask]:
        if asked.limit is not None and asked.limit > self.most:
            raise ApiError(400, f"max_tokens: {asked.limit} given; at most {self.most} here.", param="max_tokens")
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        asks = []
        for ids, question in prompts:
            room = self.context - len(ids)
            limit = min(self.most, room) if asked.limit is None else asked.limit
            if limit < 1 or limit > room:
                raise ApiError(
                    400,
                    f"The prompt has {len(ids)} tokens and {max(limit, 1)} new ones are asked for; the model's context "
                    f"is {self.context} tokens. Shorten the prompt, or ask for less.",
                    param="messages" if isinstance(asked, ChatAsked) else "prompt",
                    code="context_length_exceeded",
                )
            shared = tuple(ids)
            for number in range(asked.n or 1):
                own = (seed + number + 2**63) % 2**64 - 2**63
                asks.append(
                    Ask(
                        shared,
                        expert,
                        question,
                        limit,
                        asked.temperature or 0.0,
                        1.0 if asked.top_p is None else asked.top_p,
                        own,
                        asked.stops,
                    )
                )
        return asks
