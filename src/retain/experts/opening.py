"""A library, opened to be asked: its base, its experts, a router, and an engine over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retain.errors import DataError
from retain.experts.engine import Engine
from retain.experts.library import ExpertLibrary

Say = Callable[[str], None]
#: As a router's name: there is none, and `auto` is refused.
NO_ROUTER = "none"


def open_engine(
    library: ExpertLibrary, router: str | None = None, memory: int | None = None, say: Say = print, **settings: Any
) -> Engine:
    """An engine over all experts of a library; it is not started yet.

    Args:
        router: its name, or "none". None takes the default one, or none where the cards hold no questions.
        memory: bytes that loaded experts may take.
        say: called with a line about what is left out.
        settings: of `Engine`.

    Raises:
        ModelError: the library has no expert, or its base cannot be opened.
        ConfigError, DataError: the router cannot be had.
    """
    from retain.experts.pool import open_pool

    pool, tokenizer = open_pool(library, memory)
    return Engine(pool, tokenizer, router_of(library, pool, tokenizer, router, say), **settings)


def router_of(library: ExpertLibrary, pool: Any, tokenizer: Any, name: str | None, say: Say) -> Any:
    """The router that was asked for; None for none.

    Raises:
        ConfigError, DataError: it cannot be had.
    """
    from retain.experts.routing.opening import DEFAULT, open_router

    if name == NO_ROUTER:
        return None
    try:
        return open_router(library, pool, tokenizer, name or DEFAULT, say=say)
    except DataError as error:
        if name is not None:
            raise
        say(f"{error} Until then there is no `auto`.")
        return None
