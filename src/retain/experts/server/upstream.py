"""The OpenAI routes in front of another engine, such as vLLM: the expert is chosen here, the answer comes from there.

`auto` becomes the name of the expert that the router chooses; everything else of a request goes on as it came, and
what comes back, streams and errors too, is handed through. Only who was chosen is added.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from retain.experts.asks import AUTO, named
from retain.experts.choice import Choice
from retain.experts.server.errors import RESPONSES, SERVER, UPSTREAM, ApiError
from retain.experts.server.leaving import while_connected
from retain.experts.server.local import headers, retained
from retain.experts.server.metrics import Metrics
from retain.experts.server.prompts import Names

Route = Callable[[str], Choice]
_TEXT_LIMIT = 1_000_000


class Upstream:
    """Another OpenAI-compatible server.

    Args:
        url: base of its routes, such as `http://127.0.0.1:8000/v1`.
        key: that it asks for.
        base: its name for the base model; None asks it.
        seconds: after which an answer is given up.
    """

    def __init__(self, url: str, key: str | None = None, base: str | None = None, seconds: float = 120.0) -> None:
        self.url, self.base, self.seconds = url.rstrip("/"), base, seconds
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # no limits of its own on connections: the engine behind has a queue, and says when it is full
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(seconds, connect=10.0), limits=limits)

    async def name(self, expert: str | None) -> str:
        """What the other server calls an expert, or the base with None.

        Raises:
            ApiError: 502, it does not say which models it has.
        """
        if expert is not None:
            return expert
        if self.base is None:
            async with self._reaching():
                answer = await self.client.get(f"{self.url}/models")
            try:
                models = answer.json()["data"]
                self.base = next(m["id"] for m in models if m["id"] != AUTO and not m.get("parent"))
            except (ValueError, LookupError, TypeError, StopIteration) as error:
                raise ApiError(
                    502,
                    f"{self.url}/models: names no base model (status {answer.status_code}).",
                    SERVER,
                    code="upstream",
                ) from error
        return self.base

    async def ready(self) -> bool:
        """Whether it answers."""
        try:
            return (await self.client.get(f"{self.url}/models", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def send(self, path: str, body: dict[str, Any], stream: bool) -> httpx.Response:
        """Its answer, of which a stream is not read yet.

        Raises:
            ApiError: 502, it cannot be reached; 504, it takes too long.
        """
        async with self._reaching():
            request = self.client.build_request("POST", f"{self.url}/{path}", json=body)
            return await self.client.send(request, stream=stream)

    @asynccontextmanager
    async def _reaching(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.seconds):
                yield
        except (TimeoutError, httpx.TimeoutException) as error:
            raise ApiError(504, f"{self.url}: no answer in time.", SERVER, code="timeout") from error
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise ApiError(502, f"{self.url}: cannot be reached ({why}).", SERVER, code="upstream") from error


def routes(upstream: Upstream, names: Names, route: Route | None, metrics: Metrics) -> APIRouter:
    """/v1/chat/completions and /v1/completions.

    Args:
        names: of experts that `auto` may become.
        route: the choice for a question; called in a thread, one at a time.
    """
    router, one = APIRouter(), asyncio.Lock()

    async def choose(body: dict[str, Any], question: str) -> Choice | None:
        """None where a model was named that only the other server knows."""
        if body["model"] != AUTO:
            model = body["model"]
            return named(names(model)) if names.has(model) else None
        if route is None:
            raise ApiError(404, "model: 'auto' given, and there is no router.", param="model", code="model_not_found")
        async with one:
            choice = await asyncio.to_thread(route, question[:_TEXT_LIMIT])
        metrics.routing.observe(choice.seconds)
        return choice

    async def answer(request: Request, path: str, read: Callable[[dict[str, Any]], str]) -> Response:
        body = await _body(request)
        choice = await choose(body, read(body))
        if choice is not None:
            body["model"] = await upstream.name(choice.expert)
        own = headers(choice) if choice else {}
        stream = body.get("stream") is True
        async with while_connected(request):
            came = await upstream.send(path, body, stream)
        kept = {key: came.headers[key] for key in ("content-type", "retry-after") if key in came.headers} | own
        metrics.answers.labels(own and names.shown(choice.expert) if choice else "", str(came.status_code)).inc()
        if not stream:
            return Response(_with(came.content, choice), came.status_code, kept)
        return StreamingResponse(_through(came, choice), came.status_code, kept)

    @router.post("/v1/chat/completions", responses=RESPONSES | UPSTREAM, operation_id="chat")
    async def chat(request: Request) -> Response:
        """Answer a chat."""
        return await answer(request, "chat/completions", _last_said)

    @router.post("/v1/completions", responses=RESPONSES | UPSTREAM, operation_id="complete")
    async def complete(request: Request) -> Response:
        """Continue a text."""
        return await answer(request, "completions", _prompt)

    return router


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON ({error}).", code="invalid_json") from error
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise ApiError(400, "model: a string is needed.", param="model", code="invalid_value")
    return body


def _last_said(body: dict[str, Any]) -> str:
    """What the user said last."""
    messages = body.get("messages")
    said = (
        [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if isinstance(messages, list) else []
    )
    content = said[-1].get("content") if said else ""
    if isinstance(content, list):
        content = "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def _prompt(body: dict[str, Any]) -> str:
    """The prompt; of several the first, as all of them go to one model."""
    prompt = body.get("prompt")
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    return first if isinstance(first, str) else ""


def _with(content: bytes, choice: Choice | None) -> bytes:
    """An answer with who was chosen; what is no JSON object stays as it is."""
    if choice is None:
        return content
    try:
        answer = json.loads(content)
    except ValueError:
        return content
    if not isinstance(answer, dict) or "error" in answer:
        return content
    return json.dumps(answer | {"retain": retained(choice)}, ensure_ascii=False).encode()


async def _through(came: httpx.Response, choice: Choice | None) -> AsyncIterator[bytes]:
    """A stream as it comes, with who was chosen in its first event; closing it closes the other one."""
    try:
        first = b""
        async for piece in came.aiter_bytes():
            if choice is None:
                yield piece
                continue
            first += piece
            start, mark, rest = first.partition(b"\n\n")
            if mark:
                content = start.removeprefix(b"data:").strip()
                yield (b"data: " + _with(content, choice) if start.startswith(b"data:") else start) + mark + rest
                choice, first = None, b""
        yield first
    except httpx.HTTPError as error:
        problem = ApiError(502, f"The engine behind broke off ({type(error).__name__}).", SERVER, code="upstream")
        yield f"data: {json.dumps(problem.body)}\n\n".encode()
    finally:
        await came.aclose()
