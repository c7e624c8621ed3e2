"""The OpenAI routes, answered by an engine in this process."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from retain.experts.asks import Ask, Done, Event, Failed, Piece
from retain.experts.choice import Choice
from retain.experts.engine import Engine
from retain.experts.server import shapes
from retain.experts.server.errors import RESPONSES, api_error
from retain.experts.server.leaving import while_connected
from retain.experts.server.metrics import Metrics
from retain.experts.server.prompts import Names, Prompts

#: Header of every answer: who wrote it, percent-encoded; several are set apart by commas.
HEADER = "x-retain-expert"

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": _EVENT}},
        "headers": {HEADER: {"schema": {"type": "string"}, "description": "Who answers."}},
    }
}


@dataclass
class _Written:
    """One of a request's answers, as far as it is there."""

    ask: Ask
    choice: Choice | None = None
    text: str = ""
    end: Done | None = None

    @property
    def chosen(self) -> Choice:
        assert self.choice is not None
        return self.choice


@dataclass
class _Job:
    """A request on its way through the engine."""

    engine: Engine
    metrics: Metrics
    asks: list[Ask]
    seconds: float
    written: list[_Written] = field(default_factory=list)

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """(number of the answer, what happened), until all have ended; leaving the loop cancels the others.

        Raises:
            RetainError, TimeoutError: one of them failed, or it took too long.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self.written = [_Written(ask) for ask in self.asks]
        tickets, begun = [], time.monotonic()

        def arrive(number: int, event: Event) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (number, event))

        try:
            for number, ask in enumerate(self.asks):
                tickets.append(self.engine.submit(ask, partial(arrive, number)))
            left = len(tickets)
            while left:
                async with asyncio.timeout(begun + self.seconds - time.monotonic()):
                    number, event = await arrived.get()
                if isinstance(event, Failed):
                    raise event.error
                self._note(self.written[number], event, begun)
                left -= isinstance(event, Done)
                yield number, event
        finally:
            for ticket in tickets:
                ticket.cancel()
            for one in self.written:
                if one.end is None:
                    self.metrics.answers.labels(name(one.choice), "given up").inc()

    def _note(self, one: _Written, event: Event, begun: float) -> None:
        expert, seconds = name(one.choice), time.monotonic() - begun
        if isinstance(event, Choice):
            one.choice = event
            if event.seconds:
                self.metrics.routing.observe(event.seconds)
            self.metrics.tokens.labels(name(event), "read").inc(len(one.ask.ids))
        elif isinstance(event, Piece):
            if not one.text:
                self.metrics.first.observe(seconds)
            one.text += event.text
        elif isinstance(event, Done):
            one.end = event
            self.metrics.whole.observe(seconds)
            self.metrics.answers.labels(expert, event.reason).inc()
            self.metrics.tokens.labels(expert, "written").inc(event.tokens)

    def usage(self) -> dict[str, int]:
        """Numbers of tokens; a prompt that is answered several times is read once."""
        prompt = sum(len(ids) for ids in {id(one.ask.ids): one.ask.ids for one in self.written}.values())
        written = sum(one.end.tokens for one in self.written if one.end)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def name(choice: Choice | None) -> str:
    """How an answer calls who wrote it."""
    return Names.shown(choice.expert) if choice else ""


def retained(choice: Choice) -> dict[str, Any]:
    """The choice, as it is in an answer."""
    return {"expert": name(choice), "confidence": choice.confidence, "why": choice.why}


def headers(*choices: Choice) -> dict[str, str]:
    """The header that says who wrote."""
    return {HEADER: ",".join(dict.fromkeys(quote(name(choice)) for choice in choices))}


def routes(engine: Engine, names: Names, prompts: Prompts, metrics: Metrics, seconds: float) -> APIRouter:
    """/v1/chat/completions and /v1/completions.

    Args:
        seconds: after which an answer that is not whole is given up.
    """
    router = APIRouter()

    async def answer(request: Request, asks: list[Ask], asked: shapes.Asked, form: _Form) -> Any:
        job = _Job(engine, metrics, asks, seconds)
        if asked.stream:
            return await _stream(request, job, form, asked.usage)
        async with while_connected(request), aclosing(job.events()) as events:
            async for _ in events:
                pass
        return JSONResponse(form.whole(job), headers=headers(*(one.chosen for one in job.written)))

    @router.post(
        "/v1/chat/completions", response_model=shapes.ChatAnswer, responses=_STREAM | RESPONSES, operation_id="chat"
    )
    async def chat(request: Request, asked: shapes.ChatAsked) -> Any:
        """Answer a chat."""
        return await answer(request, await prompts.chat(asked), asked, _Form("chat.completion", "chatcmpl-"))

    @router.post(
        "/v1/completions", response_model=shapes.TextAnswer, responses=_STREAM | RESPONSES, operation_id="complete"
    )
    async def complete(request: Request, asked: shapes.TextAsked) -> Any:
        """Continue texts."""
        return await answer(request, await prompts.text(asked), asked, _Form("text_completion", "cmpl-"))

    return router


async def _stream(request: Request, job: _Job, form: _Form, usage: bool) -> StreamingResponse:
    """Server-sent events. The headers wait for the first event, so that errors before it have their own status."""
    events = job.events()
    try:
        async with while_connected(request):
            first = await anext(events)
    except BaseException:
        await events.aclose()
        raise

    async def lines() -> AsyncIterator[str]:
        async with aclosing(events):
            try:
                yield form.chunk(job, *first)
                async for number, event in events:
                    yield form.chunk(job, number, event)
                if usage:
                    yield form.usage(job)
            except Exception as error:
                yield _line(api_error(error).body)
            yield "data: [DONE]\n\n"

    known = headers(first[1]) if isinstance(first[1], Choice) else {}
    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", **known})


class _Form:
    """How the answers of one request are written.

    Args:
        kind: `object` in a whole answer.
        prefix: of the answer's id.
    """

    def __init__(self, kind: str, prefix: str) -> None:
        self.kind, self.chat = kind, kind.startswith("chat")
        self.common = {"id": prefix + secrets.token_hex(12), "created": int(time.time())}

    def whole(self, job: _Job) -> dict[str, Any]:
        """All of it at once."""
        first = job.written[0].chosen
        choices = []
        for i, one in enumerate(job.written):
            assert one.end is not None
            said = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
            own = {} if self.chat else {"retain": retained(one.chosen)}
            choices.append({"index": i, **said, "finish_reason": one.end.reason, "logprobs": None, **own})
        rest = {"choices": choices, "usage": job.usage(), "retain": retained(first)}
        return {**self.common, "object": self.kind, "model": name(first), **rest}

    def chunk(self, job: _Job, number: int, event: Event) -> str:
        """One event: the choice, a piece of text, or the end."""
        text = event.text if isinstance(event, Piece) else ""
        end = event.reason if isinstance(event, Done) else None
        if self.chat:
            delta: dict[str, Any] = {"content": text} if text else {}
            if isinstance(event, Choice):
                delta = {"role": "assistant", "content": ""}
            choice = {"index": number, "delta": delta, "finish_reason": end, "logprobs": None}
        else:
            choice = {"index": number, "text": text, "finish_reason": end, "logprobs": None}
        own = {"retain": retained(event)} if isinstance(event, Choice) else {}
        return _line({**self._head(job, number), "choices": [choice], **own})

    def usage(self, job: _Job) -> str:
        """The numbers of tokens, after everything."""
        return _line({**self._head(job, 0), "choices": [], "usage": job.usage()})

    def _head(self, job: _Job, number: int) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self.kind
        return {**self.common, "object": kind, "model": name(job.written[number].choice)}


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
