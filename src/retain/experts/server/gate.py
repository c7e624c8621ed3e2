"""What stands before every route: keys, the size of a request, and the end of the service."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from retain.experts.server.errors import SERVER, ApiError
from retain.experts.server.metrics import Metrics

#: Asked by machines that look whether the service is there; they have no key.
OPEN = ("/health", "/ready")
#: Seconds in which a request must have arrived.
ARRIVAL = 30.0


class Gate:
    """An ASGI application before another one.

    Args:
        app: the routes.
        keys: one of which a request must bring; none asks for none.
        most_bytes: of a request's body.
        metrics: where answers are counted.
    """

    def __init__(self, app: Any, keys: Sequence[str], most_bytes: int, metrics: Metrics) -> None:
        self.app, self.most_bytes, self.metrics = app, most_bytes, metrics
        self.stopping, self.inside = False, 0
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request in, or answer why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.inside += 1
        try:
            try:
                self._check(scope)
                arrived = await self._body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, counting)
                return
            if arrived is None:  # it has left already
                return

            async def replayed() -> Any:
                return arrived.pop() if arrived else await receive()

            await self.app(scope, replayed, counting)
        finally:
            self.inside -= 1
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()

    def _check(self, scope: Any) -> None:
        if scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        if self._keys and not self._known(headers.get(b"authorization", b"")):
            raise ApiError(
                401,
                "No key, or a wrong one. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.stopping:
            raise ApiError(
                503,
                "The server is stopping. Ask another one, or later.",
                SERVER,
                code="stopping",
                headers={"Retry-After": "5", "Connection": "close"},
            )

    def _known(self, header: bytes) -> bool:
        """Whether a header brings a key. Digests of one length are compared, all of them, in constant time."""
        kind, _, key = header.partition(b" ")
        given = _digest(key.strip())
        right = [hmac.compare_digest(given, known) for known in self._keys]
        return kind.lower() == b"bearer" and any(right)

    async def _body(self, scope: Any, receive: Any) -> list[Any] | None:
        """The whole body, as one message; None when the client left before it was there.

        Raises:
            ApiError: 413, it is too large; 408, it takes too long.
        """
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told) > self.most_bytes:
            raise self._too_large()
        body = b""
        try:
            async with asyncio.timeout(ARRIVAL):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.most_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return [{"type": "http.request", "body": body, "more_body": False}]
        except TimeoutError:
            raise ApiError(
                408, f"The request did not arrive within {ARRIVAL:g} seconds.", headers={"Connection": "close"}
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request has more than {self.most_bytes:,} bytes, which is the most here.",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
