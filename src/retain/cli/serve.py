"""`retain serve`: experts behind the OpenAI routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from retain.experts.server.app import Service

KEYS = "RETAIN_API_KEYS"


def command(
    library: Annotated[
        str, typer.Option("--library", "-l", envvar="RETAIN_EXPERTS", help="Folder of the experts.")
    ] = "experts",
    host: Annotated[str, typer.Option(help="Address to listen on; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    key: Annotated[list[str] | None, typer.Option(help=f"Key that requests must bring; also {KEYS}=ONE,TWO.")] = None,
    router: Annotated[str | None, typer.Option(help="A router, as `retain experts route` names it, or none.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most answers written at a time.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Most requests that wait; more are answered with 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens per answer.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds per request, waiting included.")] = 120.0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request's body.")] = 1_000_000,
    memory: Annotated[int | None, typer.Option(min=1, help="MiB for loaded experts; others are loaded anew.")] = None,
    remember: Annotated[int, typer.Option(min=0, help="Greedy answers kept and given again.")] = 0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish what is running, when told to stop.")] = 30.0,
    upstream: Annotated[
        str | None, typer.Option(help="Let another server answer, such as http://127.0.0.1:9000/v1.")
    ] = None,
    upstream_base: Annotated[str | None, typer.Option(help="Its name of the base; asked for by default.")] = None,
    upstream_key: Annotated[str, typer.Option(help="Environment variable with its key.")] = "OPENAI_API_KEY",
) -> None:
    """Serve experts to any OpenAI client: `model: "auto"` routes, a name asks one expert, `base` the base model."""
    from retain.cli.common import console, quiet_libraries, quietly

    quiet_libraries()
    from retain.experts.library import ExpertLibrary
    from retain.experts.server import need_extra

    need_extra()
    experts = ExpertLibrary(library)
    experts.known_base()  # before what takes seconds to load
    from retain.experts.server.app import Limits
    from retain.experts.server.running import Server, public

    out, keys = console(), _keys(key)
    limits = Limits(max_tokens, timeout, max_bytes)
    if upstream:
        service = _router(experts, upstream, upstream_base, upstream_key, router, keys, limits, quietly(out))
    else:
        settings = {"rows": rows, "waiting": queue, "remember": remember}
        service = _engine(experts, router, memory, settings, keys, limits, quietly(out))
    if public(host) and not keys:
        out.print(
            f"{host} can be reached by others, and no key is asked for: give one with --key or {KEYS}.", style="yellow"
        )
    server = Server(service, host, port, grace)
    server.when_ready = lambda: out.print(  # nothing before it listens
        f"{server.address}/v1 · {', '.join(service.models)}", highlight=False, markup=False, soft_wrap=True
    )
    server.run()


def _keys(given: list[str] | None) -> list[str]:
    import os

    found = [*(given or []), *os.environ.get(KEYS, "").split(",")]
    return [key.strip() for key in found if key.strip()]


def _engine(
    library: Any,
    router: str | None,
    memory: int | None,
    settings: dict[str, int],
    keys: list[str],
    limits: Any,
    say: Any,
) -> Service:
    """A server that answers itself."""
    from retain.experts.opening import open_engine
    from retain.experts.server.app import serve_engine

    engine = open_engine(library, router, None if memory is None else memory * 2**20, say, **settings)
    return serve_engine(engine, str(library.base), keys, limits)


def _router(
    library: Any, url: str, base: str | None, key: str, router: str | None, keys: list[str], limits: Any, say: Any
) -> Service:
    """A router in front of another server; `keyword` needs no model here."""
    import os

    from retain.experts.opening import router_of
    from retain.experts.server.app import serve_upstream
    from retain.experts.server.upstream import Upstream
    from retain.models.endpoint import check_url

    check_url(url)
    pool = tokenizer = None
    if router not in ("keyword", "none"):
        from retain.experts.pool import open_pool

        pool, tokenizer = open_pool(library)
    chosen = router_of(library, pool, tokenizer, router, say)
    behind = Upstream(url, os.environ.get(key), base, limits.seconds)
    return serve_upstream(behind, library, str(library.base), chosen and (lambda q: chosen.route([q])[0]), keys, limits)
