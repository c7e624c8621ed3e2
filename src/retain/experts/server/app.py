"""The application: routes, what stands before them, and what begins and ends with it."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse

from retain.experts.asks import AUTO
from retain.experts.engine import Engine
from retain.experts.server import errors, local, shapes, upstream
from retain.experts.server.gate import Gate
from retain.experts.server.metrics import Metrics
from retain.experts.server.prompts import BASE, Names, Prompts


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        max_tokens: new tokens per answer.
        seconds: per request, waiting included.
        max_bytes: of a request's body.
    """

    max_tokens: int = 1024
    seconds: float = 120.0
    max_bytes: int = 1_000_000


@dataclass
class Service:
    """A whole server: `app` is what is run, `gate` knows what is still inside."""

    app: Gate
    api: FastAPI
    metrics: Metrics
    names: Names

    @property
    def models(self) -> list[str]:
        """What can be asked."""
        return [card["id"] for card in _cards(self.names)]

    @property
    def gate(self) -> Gate:
        return self.app


def serve_engine(engine: Engine, base: str, keys: Sequence[str] = (), limits: Limits = Limits()) -> Service:
    """A server that answers itself.

    Args:
        engine: started and stopped with the application.
        base: the base model's name.
        keys: one of which a request must bring; none asks for none.
    """
    metrics, library = Metrics(), engine.pool.library
    names = Names(library, base, routed=engine.router is not None)
    prompts = Prompts(engine.tokenizer, names, limits.max_tokens, engine.context, engine.vocabulary)
    metrics.gauge("retain_waiting", "Requests in the queue.", lambda: engine.waiting)
    metrics.gauge("retain_running", "Rows in the batch.", lambda: engine.running)
    metrics.gauge("retain_expert_bytes", "Memory of the loaded experts.", lambda: engine.pool.bytes)
    metrics.gauge("retain_experts_loaded", "Experts in memory.", lambda: len(engine.pool.loaded))
    metrics.gauge("retain_remembered_hits", "Answers given from memory.", lambda: engine.remembered)

    @asynccontextmanager
    async def alive(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    async def ready() -> bool:
        return engine.alive

    routes = local.routes(engine, names, prompts, metrics, limits.seconds)
    return _service(routes, names, ready, alive, keys, limits, metrics)


def serve_upstream(
    behind: upstream.Upstream,
    library: Any,
    base: str,
    route: upstream.Route | None,
    keys: Sequence[str] = (),
    limits: Limits = Limits(),
) -> Service:
    """A router in front of another server.

    Args:
        library: of experts that the other server has too.
        route: the choice for a question.
    """
    metrics = Metrics()
    names = Names(library, base, routed=route is not None)

    @asynccontextmanager
    async def alive(app: FastAPI) -> AsyncIterator[None]:
        yield
        await behind.client.aclose()

    return _service(upstream.routes(behind, names, route, metrics), names, behind.ready, alive, keys, limits, metrics)


def _service(
    routes: Any, names: Names, ready: Any, alive: Any, keys: Sequence[str], limits: Limits, metrics: Metrics
) -> Service:
    api = FastAPI(
        title="retain", summary="Experts on one base model, behind the OpenAI routes.", lifespan=alive,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    errors.install(api)
    gate = Gate(api, keys, limits.max_bytes, metrics)
    api.include_router(routes)

    @api.get("/v1/models", response_model=shapes.ModelList, responses=_only(401, 503), operation_id="models")
    async def models() -> Any:
        """The experts, the base, and `auto`."""
        return {"object": "list", "data": _cards(names)}

    @api.get(
        "/v1/models/{model}", response_model=shapes.ModelCard, responses=_only(401, 404, 503), operation_id="model"
    )
    async def model(model: str) -> Any:
        """One of them."""
        names(model)
        shown = BASE if names.has(model) and model not in names.library else model
        return next(card for card in _cards(names) if card["id"] == shown)

    @api.get("/health", operation_id="health")
    async def health() -> dict[str, str]:
        """The process is there."""
        return {"status": "ok"}

    @api.get("/ready", responses=_only(503), operation_id="ready")
    async def is_ready() -> Any:
        """Requests are taken."""
        if gate.stopping or not await ready():
            raise errors.ApiError(503, "Not ready.", errors.SERVER, code="not_ready")
        return JSONResponse({"status": "ready"})

    @api.get("/metrics", responses=_only(401, 503), response_class=Response, operation_id="metrics")
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.page(), media_type="text/plain; version=1.0.0; charset=utf-8")

    api.openapi = lambda: _described(api, bool(keys))  # type: ignore[method-assign]
    return Service(gate, api, metrics, names)


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: errors.RESPONSES[status] for status in statuses}


def _cards(names: Names) -> list[dict[str, Any]]:
    started = {"object": "model", "created": 0, "owned_by": "retain"}
    found: list[dict[str, Any]] = [{**started, "id": BASE, "parent": None, "description": names.base}]
    if names.routed:
        found.append({**started, "id": AUTO, "parent": None, "description": "The router chooses."})
    for name, card in names.library.cards().items():
        made = int(datetime.datetime.fromisoformat(card.created).timestamp())
        found.append({**started, "id": name, "created": made, "parent": BASE, "description": card.description})
    return found


def _described(api: FastAPI, keyed: bool) -> dict[str, Any]:
    """The interface's description: what FastAPI makes, without its own form of errors."""
    if api.openapi_schema:
        return api.openapi_schema
    found = get_openapi(title=api.title, version=api.version, summary=api.summary, routes=api.routes)
    for path in found["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        found["components"]["schemas"].pop(name, None)
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    api.openapi_schema = found
    return found
