"""`retain chat`: ask experts in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from retain.experts.conversation import Conversation


def command(
    library: Annotated[
        str, typer.Option("--library", "-l", envvar="RETAIN_EXPERTS", help="Folder of the experts.")
    ] = "experts",
    ask: Annotated[str | None, typer.Option(help="Answer this and end; who answered goes to standard error.")] = None,
    expert: Annotated[
        str | None, typer.Option(help="Who answers: a name, or base; the router chooses by itself.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="A router, as `retain experts route` names it, or none.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens per answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Draw among the likeliest with this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Ask experts; shows which one answers and how sure the router is.

    In a conversation: /expert NAME, /base, /auto, /why, /new, /quit. Lines from a pipe are answered one after another.
    """
    from retain.cli.common import console, quiet_libraries, quietly

    quiet_libraries()
    from rich.console import Console

    from retain.experts.library import ExpertLibrary

    experts = ExpertLibrary(library)
    experts.known_base()  # before what takes seconds to load
    from retain.experts.conversation import Conversation
    from retain.experts.opening import open_engine

    aside = Console(stderr=True)
    with aside.status("opening the experts"):
        engine = open_engine(experts, router, say=quietly(aside), rows=1).start()
    talk = Conversation(engine, max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    try:
        if expert is not None:
            talk.command("/base" if expert == "base" else f"/expert {expert}")
        if ask is not None:
            _answer(talk, ask, console(), aside)
        else:
            _talk(talk, console())
    finally:
        engine.stop()


def _talk(talk: Conversation, screen: Any) -> None:
    """Questions and commands until the end; a mistake is told and the conversation goes on."""
    from retain.errors import RetainError
    from retain.experts.conversation import HELP

    if sys.stdin.isatty():
        screen.print(HELP, style="dim", highlight=False, markup=False)
    for line in _lines():
        try:
            if line.startswith("/"):
                screen.print(talk.command(line), style="dim", highlight=False, markup=False)
            elif line:
                _answer(talk, line, screen, screen)
        except EOFError:
            return
        except RetainError as error:
            screen.print(str(error), style="red", highlight=False, markup=False)
        except KeyboardInterrupt:  # of one answer, not of the conversation
            screen.print()


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys, and lines typed before)
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return


def _answer(talk: Conversation, question: str, screen: Any, aside: Any) -> None:
    """Who answers, in a dim line, and the answer as it comes."""
    from retain.experts.asks import Done, Piece
    from retain.experts.choice import Choice
    from retain.experts.conversation import name_of

    for event in talk.ask(question):
        if isinstance(event, Choice):
            sure = f" · {event.confidence:.0%} sure" if talk.expert == "auto" else ""
            aside.print(f"{name_of(event)}{sure}", style="dim", highlight=False, markup=False)
        elif isinstance(event, Piece):
            screen.print(event.text, end="", highlight=False, markup=False, soft_wrap=True)
            screen.file.flush()
        elif isinstance(event, Done):
            screen.print(" …" if event.reason == "length" else "", highlight=False)
