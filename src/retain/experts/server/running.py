"""Running a server: until it is told to stop, and then until what it has begun is finished."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from retain.experts.server.app import Service


class Server(uvicorn.Server):
    """Stops in two steps. Told to stop, it refuses what is new with 503 and finishes what is inside; told once more, or
    after `grace` seconds, it closes.

    Args:
        service: what it serves.
        host, port: where; port 0 takes a free one.
        grace: seconds for what is inside.
    """

    def __init__(self, service: Service, host: str, port: int, grace: float = 30.0, **options: Any) -> None:
        # no `log_config`: uvicorn's closes all handlers that there are, also those of the program around it
        usual = {"log_level": "warning", "log_config": None, "lifespan": "on", "timeout_graceful_shutdown": 1}
        options = usual | options
        super().__init__(uvicorn.Config(service.app, host=host, port=port, **options))
        self.service, self.grace = service, grace
        self._told: float | None = None
        self.when_ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: Any = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self.when_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal does not wait."""
        if self._told is None:
            self.leave()
        else:
            self.should_exit = self.force_exit = True

    def leave(self) -> None:
        """Begin to stop."""
        self.service.gate.stopping, self._told = True, time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        if self._told is not None and (not self.service.gate.inside or time.monotonic() - self._told > self.grace):
            self.should_exit = True
        return await super().on_tick(counter)

    @property
    def address(self) -> str:
        """Where it listens, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def public(host: str) -> bool:
    """Whether others than this machine may reach an address."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
