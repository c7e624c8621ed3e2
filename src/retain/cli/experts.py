"""`retain experts`: a library of adapters of one base: add, train, list, show, route, remove, rename, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from retain.config import RunConfig
    from retain.experts.card import ExpertCard
    from retain.experts.library import ExpertLibrary
    from retain.experts.routing.base import Router

app = typer.Typer(help="Experts: adapters for many domains on one base.", no_args_is_help=True)

Folder = Annotated[str, typer.Option("--library", "-l", envvar="RETAIN_EXPERTS", help="Folder of the library.")]
Name = Annotated[str, typer.Argument(help="Name of the expert.")]
Description = Annotated[str, typer.Option(help="What it is for, in a sentence.")]
Language = Annotated[str, typer.Option(help="Its language, such as en or zh.")]
Keywords = Annotated[str, typer.Option(help="Words that point to it, separated by commas.")]
Examples = Annotated[int, typer.Option(help="Questions of its training rows to keep, for routing.", min=0)]
ExamplesFrom = Annotated[str | None, typer.Option(help="Questions for routing: a .txt with one per line, or rows.")]


@app.command()
def add(
    name: Name,
    source: Annotated[str, typer.Argument(help="A PEFT adapter's folder, or the directory of a finished run.")],
    library: Folder = "experts",
    base: Annotated[str | None, typer.Option(help="The adapter's base, where its folder tells no place.")] = None,
    description: Description = "",
    language: Language = "",
    keywords: Keywords = "",
    examples: Examples = 32,
    examples_from: ExamplesFrom = None,
) -> None:
    """Copy an adapter, or what a run learned, into the library."""
    words = _words(description, language, keywords)
    _add(_library(library), name, source, base, examples, examples_from, words)


@app.command()
def train(
    name: Name,
    data: Annotated[str, typer.Option("--data", "-d", help="Data to learn: file, folder or hub id.")],
    library: Folder = "experts",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base; that of the library by default.")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="A recipe by name; see `retain methods`.")] = None,
    set_: Annotated[
        list[str], typer.Option("--set", "-o", help="Override a setting: train.max_steps=20, methods=[lora, replay] …")
    ] = [],  # noqa: B006
    output: Annotated[str | None, typer.Option(help="Run directory; runs/<name> by default.")] = None,
    description: Description = "",
    language: Language = "",
    keywords: Keywords = "",
    examples: Examples = 32,
    examples_from: ExamplesFrom = None,
) -> None:
    """Train an adapter as `retain run` does, measured before and after, and add it.

    Run the same command again to go on after a stop.
    """
    from retain.cli.run import carry_out
    from retain.experts.names import check_name

    shelf = _library(library)
    shelf.require_free(check_name(name))
    settings = _settings(shelf, name, data, model, preset, set_, output)
    if carry_out(settings):
        words = _words(description, language, keywords)
        _add(shelf, name, str(settings.directory), None, examples, examples_from, words)


@app.command("list")
def list_(library: Folder = "experts") -> None:
    """Show the experts of the library."""
    from retain.cli.common import console

    shelf = _library(library)
    cards = shelf.cards()
    out = console()
    if not cards:
        out.print(
            f"{library}: no experts yet. Add one: `retain experts add`, or `retain experts train`.", highlight=False
        )
        return
    out.print(_table(cards))
    size = sum(card.bytes for card in cards.values())
    out.print(f"[dim]base[/dim] {shelf.base}  [dim]in all[/dim] {_size(size)}", highlight=False)


@app.command()
def show(name: Name, library: Folder = "experts") -> None:
    """Show the card of an expert."""
    from rich.markdown import Markdown

    from retain.cli.common import console

    shelf = _library(library)
    card, out = shelf.card(name), console()
    text = card.readme().split("---\n", 2)[2]
    out.print(Markdown(text))
    out.print()
    about = {
        "base": card.base,
        "folder": str(shelf.path(name)),
        "keywords": ", ".join(card.keywords),
        "methods": ", ".join(card.training.get("methods", {})),
        "run": str(card.training.get("run", "")),
        "examples": "".join(f"\n  {question}" for question in card.examples),
    }
    for word, value in about.items():
        if value:
            out.print(f"[dim]{word:<9}[/dim]", end="")
            out.print(value, markup=False, highlight=False, soft_wrap=True)


@app.command()
def remove(name: Name, library: Folder = "experts") -> None:
    """Delete an expert."""
    _library(library).remove(name)
    typer.echo(f"Removed: {name}")


@app.command()
def rename(name: Name, new: Annotated[str, typer.Argument(help="Its new name.")], library: Folder = "experts") -> None:
    """Give an expert another name."""
    _library(library).rename(name, new)
    typer.echo(f"Renamed: {name} → {new}")


@app.command()
def export(
    to: Annotated[str, typer.Option("--to", help="Folder to write; must not exist yet.")],
    names: Annotated[list[str] | None, typer.Argument(help="Experts; with --vllm all by default.")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Folders and command for vLLM's multi-LoRA.")] = False,
    library: Folder = "experts",
) -> None:
    """Write an expert as a plain PEFT folder, or several with the command that serves them with vLLM."""
    from retain.errors import ConfigError

    shelf = _library(library)
    if vllm:
        from retain.experts.vllm import export as export_vllm

        typer.echo(f"Command: {export_vllm(shelf, to, names or ())}")
        return
    if names is None or len(names) != 1:
        raise ConfigError(f"export: {len(names or ())} experts named. Name one, or use --vllm for several.")
    typer.echo(f"Adapter: {shelf.export(names[0], to)}")


@app.command()
def route(
    question: Annotated[str | None, typer.Argument(help="A question; without one the router is only fitted.")] = None,
    library: Folder = "experts",
    router: Annotated[
        str | None, typer.Option("--router", "-r", help="combined (default), keyword, gate, prototype or likelihood.")
    ] = None,
    why: Annotated[bool, typer.Option("--why", help="Say why, and how likely every expert is.")] = False,
    others: Annotated[
        str | None, typer.Option(help="Questions for nobody, instead of the built-in ones: a .txt, or rows.")
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(help="prototype: a sentence-transformers model instead of the base.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the choice as JSON.")] = False,
) -> None:
    """Say which expert answers a question, or that the base does.

    The router learns from the questions on the experts' cards: on first use, and again when they change.
    """
    import dataclasses
    import json

    from retain.experts.routing.opening import DEFAULT

    found = _router(_library(library), router or DEFAULT, others, embedding)
    if question is None:
        known = ", ".join(found.experts)
        typer.echo(f"{found.name}: {found.calibration.right:.1%} of held-out questions right; knows {known}")
        return
    (choice,) = found.route([question])
    if json_:
        typer.echo(json.dumps(dataclasses.asdict(choice), ensure_ascii=False))
        return
    typer.echo(f"{choice.expert or 'base'}  {choice.confidence:.0%}")
    if why:
        typer.echo(choice.why)
        for name, chance in sorted(choice.scores.items(), key=lambda one: -one[1]):
            typer.echo(f"  {chance:>4.0%}  {name}")
        typer.echo(f"{1000 * choice.seconds:.0f} ms")


def _library(folder: str) -> ExpertLibrary:
    from retain.experts.library import ExpertLibrary

    return ExpertLibrary(folder)


def _words(description: str, language: str, keywords: str) -> dict[str, Any]:
    """What a user says about an expert."""
    return {
        "description": description,
        "language": language,
        "keywords": [word.strip() for word in keywords.split(",") if word.strip()],
    }


def _add(
    shelf: ExpertLibrary,
    name: str,
    source: str,
    base: str | None,
    examples: int,
    examples_from: str | None,
    words: dict[str, Any],
) -> None:
    from retain.cli.common import console, quiet_libraries, quietly
    from retain.errors import ConfigError

    quiet_libraries()
    from retain.experts.made import of_run, questions_of

    out, adapter, fields = console(), Path(source), words
    if (adapter / "run.yaml").is_file():
        if base is not None:
            raise ConfigError("--base: a run knows its base. Leave it out.")
        adapter, base, more = of_run(source, 0 if examples_from else examples, quietly(out))
        fields = words | more
    if examples_from:
        fields = fields | {"examples": questions_of(examples_from, examples)}
    with out.status("comparing the adapter with its base …"):
        card = shelf.add(name, adapter, base=base, **fields)
    out.print(
        f"Expert: {shelf.path(name)}  [dim]rank {card.rank}, {_size(card.bytes)}, {len(card.examples)} examples[/dim]",
        highlight=False,
    )


def _router(shelf: ExpertLibrary, name: str, others: str | None, embedding: str | None) -> Router:
    """The router of a library; the base is opened only for those that read with it."""
    from retain.cli.common import quiet_libraries
    from retain.experts.routing.opening import open_router, reads_with_base

    nobody = None
    if others:
        from retain.experts.made import questions_of

        nobody = questions_of(others, 10**6)
    base: tuple[Any, Any] = (None, None)
    if reads_with_base(name, embedding) and shelf.base is not None:
        quiet_libraries()
        from retain.experts.pool import open_pool

        base = open_pool(shelf)
    said = partial(typer.echo, err=True)
    return open_router(shelf, *base, name, others=nobody, embedding=embedding, watched=_reading, say=said)


@contextmanager
def _reading(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error while questions are read."""
    from rich.console import Console

    from retain.training.watch import bar

    with bar(transient=True, console=Console(stderr=True)) as progress:
        job = progress.add_task("reading questions", total=total, note="")
        yield lambda n: progress.update(job, advance=n)


def _settings(
    shelf: ExpertLibrary,
    name: str,
    data: str,
    model: str | None,
    preset: str | None,
    overrides: list[str],
    output: str | None,
) -> RunConfig:
    """The configuration of a run that makes an expert: one task, and plain LoRA among the methods.

    Raises:
        ConfigError: as `cli.plan.configuration`; or settings with which no expert comes out.
        ModelError: another base than that of the library.
    """
    import json

    from retain.cli.plan import configuration
    from retain.errors import ConfigError
    from retain.methods import build

    own = [f"name={json.dumps(name)}", f"tasks.0.name={json.dumps(name)}"]
    settings = configuration(None, [data], model or shelf.base, output, [*own, *overrides], preset)
    if len(settings.tasks) != 1:
        raise ConfigError(f"tasks: {len(settings.tasks)} given; an expert learns one. Train one expert per task.")
    listed = {method.name: method for method in build(settings.methods)}
    if "lora" not in listed:
        others = [entry for entry in settings.methods if entry not in ("none", {"none": None}, {"none": {}})]
        settings = settings.model_copy(update={"methods": [{"lora": {}}, *others]})
        listed = {method.name: method for method in build(settings.methods)}
    lora = listed["lora"].config
    if lora.kind != "lora" or lora.dora or not lora.r:
        raise ConfigError("methods.lora: an expert is a plain LoRA. Set neither `kind` nor `dora`, and r above 0.")
    shelf.require_base(settings.model.name, name)
    return settings


def _table(cards: dict[str, ExpertCard]) -> Table:
    """One line per expert."""
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("expert", overflow="fold", style="bold")
    table.add_column("domain", overflow="fold", max_width=40)
    for head in ("rank", "size", "learned", "kept"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("added", no_wrap=True)
    for name, card in cards.items():
        domain = card.description or ", ".join(card.keywords) or (card.data.source if card.data else "")
        language = f" ({card.language})" if card.language else ""
        found = card.forgetting
        learned = _points(found.learned.value) if found and found.learned else "–"
        kept = _points(found.kept.value) if found and found.kept else "–"
        table.add_row(name, domain + language, str(card.rank), _size(card.bytes), learned, kept, card.created[:10])
    return table


def _points(change: float) -> str:
    """A change of a share in points."""
    return f"{100 * change:+.1f}"


def _size(size: int) -> str:
    """Bytes as "18.8 MiB"."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
