"""Whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from retain.experts.server.errors import Left


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel what runs inside when the client leaves. The body must have been read.

    Raises:
        Left: it did.
    """
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise Left from None
        raise
    finally:
        watching.cancel()
