"""A library's router: fitted to its cards when there is none yet or they changed, and kept in the library's folder.

    experts/.routers/keyword/  router.json  router.safetensors

What was fitted is known again by a fingerprint over the cards' questions and words, the experts' weights where a router
looks at them, the base, the questions for nobody, and the settings.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from retain.errors import ConfigError, DataError, RunError, unknown
from retain.experts.routing.base import FEWEST, VERSION, Progress, Router
from retain.experts.routing.everyday import EVERYDAY

if TYPE_CHECKING:
    from pathlib import Path

    from retain.experts.library import ExpertLibrary
    from retain.experts.pool import AdapterPool

#: Measured in docs/routing.md.
DEFAULT = "combined"
ROUTERS = ("combined", "keyword", "gate", "prototype", "likelihood")
FOLDER = ".routers"
#: Share of the base's layers that are read; measured in docs/routing.md.
DEPTH = 0.25

Say = Callable[[str], None]
Watched = Callable[[int], AbstractContextManager[Progress]]


def open_router(
    library: ExpertLibrary,
    pool: AdapterPool | None = None,
    tokenizer: Any = None,
    name: str = DEFAULT,
    *,
    others: Sequence[str] | None = None,
    embedding: str | None = None,
    watched: Watched | None = None,
    say: Say = lambda line: None,
) -> Router:
    """The router of a library, loaded if it still fits and else fitted and saved.

    An expert without at least two questions on its card is left out, with a line to `say`: nothing is known of it, and
    it answers when it is asked for by name. To take a changed library in, call this again; without changes it only
    reads files.

    Args:
        library: experts with questions on their cards.
        pool, tokenizer: the base model; `keyword` needs neither.
        name: one of `ROUTERS`.
        others: questions for nobody; by default those of the core suite and everyday ones in English and Chinese.
        embedding: sentence-transformers model for `prototype`, in place of the base's hidden states.
        watched: called with the number of questions before they are read to fit it; its context gives what is called
            with the number just read.
        say: called with a line for the user.

    Raises:
        ConfigError: unknown router, or a model that it needs is not given.
        DataError: no expert with enough questions.
    """
    reads_with_base(name, embedding)
    cards = library.cards()
    known = {n: card for n, card in cards.items() if len(set(card.examples)) >= FEWEST}
    for left in cards.keys() - known.keys():
        say(
            f"{left}: fewer than {FEWEST} questions on its card, so it is never chosen by itself. Add some: "
            f"`retain experts add {left} … --examples-from FILE`."
        )
    if not known:
        raise DataError(
            f"{library.folder}: no expert with {FEWEST} or more questions on its card, so nothing to route by. "
            "Give them when an expert is added (`--examples-from FILE`)."
        )
    router = make(name, pool, tokenizer, embedding)
    nobody = default_others() if others is None else list(others)
    router.fingerprint = fingerprint(router, known, nobody)
    folder = library.folder / FOLDER / name
    try:
        saved = make(name, pool, tokenizer, embedding).load(folder)
        if saved.fingerprint == router.fingerprint:
            return saved
    except RunError:
        pass
    about = {n: [line for line in (card.description, " ".join(card.keywords)) if line] for n, card in known.items()}
    examples = {n: card.examples for n, card in known.items()}
    with (watched or _unwatched)(sum(map(len, [*examples.values(), nobody]))) as progress:
        router.fit(examples, nobody, about, progress)
    try:
        _replace(folder, router)
    except OSError as error:
        say(f"{folder}: cannot be written ({error.strerror or error}); the router is fitted anew next time.")
    return router


def reads_with_base(name: str, embedding: str | None = None) -> bool:
    """Whether a router needs the base model.

    Raises:
        ConfigError: unknown router, or an `embedding` that it would not use.
    """
    if name not in ROUTERS:
        raise ConfigError(unknown("router", name, ROUTERS))
    if embedding and name != "prototype":
        raise ConfigError(f"embedding: router '{name}' does not use one. Leave it out, or use `prototype`.")
    return name != "keyword" and not embedding


@contextmanager
def _unwatched(total: int) -> Iterator[Progress]:
    yield lambda n: None


def make(name: str, pool: AdapterPool | None, tokenizer: Any, embedding: str | None = None) -> Router:
    """A router that has learnt nothing yet.

    Raises:
        ConfigError: unknown router, or a model that it needs is not given.
    """
    reads_with_base(name, embedding)  # refuses an unknown name
    if name == "keyword":
        from retain.experts.routing.keyword import Keyword

        return Keyword()
    if embedding:
        from retain.experts.routing.prototype import Prototype, embedding_reader

        return Prototype(embedding_reader(embedding), embedding=embedding)
    if pool is None or tokenizer is None:  # only what reads with the base comes here
        raise ConfigError(f"router: '{name}' reads questions with the base model, and none is given. Use `keyword`.")
    if name == "likelihood":
        from retain.experts.routing.likelihood import Likelihood, pool_scorer

        return Likelihood(pool_scorer(pool, tokenizer))
    from retain.models.states import StateReader

    reader = StateReader(pool.model, tokenizer, DEPTH, pool.lock)
    settings: dict[str, Any] = {"depth": DEPTH, "layers": reader.layers}
    if name == "combined":
        from retain.experts.routing.combined import Combined

        return Combined(reader, **settings)
    if name == "gate":
        from retain.experts.routing.gate import Gate

        return Gate(reader, **settings)
    from retain.experts.routing.prototype import Prototype

    return Prototype(reader, **settings)


def default_others() -> list[str]:
    """Questions for nobody: prompts of the core suite and everyday requests."""
    return [*core_prompts(), *EVERYDAY]


def core_prompts() -> list[str]:
    """The questions of the built-in core suite, in the order of its files."""
    folder = importlib.resources.files("retain.probes") / "suites" / "core"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".jsonl")), key=lambda f: f.name)
    rows = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line)
    return list(dict.fromkeys(row["prompt"] for row in rows if "prompt" in row))


def fingerprint(router: Router, cards: Any, others: Sequence[str]) -> str:
    """Digest of everything that a fitted router depends on."""

    def parts() -> Iterator[Any]:
        yield VERSION, router.name, router.settings, list(others)
        for name, card in sorted(cards.items()):
            yield name, card.examples
            if router.name in ("keyword", "combined"):
                yield card.description, card.keywords
            if router.needs_model:
                yield card.base, card.base_digest
            if router.name == "likelihood":
                yield card.digest

    found = hashlib.blake2b(digest_size=16)
    for part in parts():
        found.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def _replace(folder: Path, router: Router) -> None:
    """Write a router beside its place and put it there whole; of two at once the later one stays."""
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        router.save(partial)
        if folder.exists():
            old = folder.with_name(f"{partial.name}-old")
            os.rename(folder, old)
            shutil.rmtree(old, ignore_errors=True)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
