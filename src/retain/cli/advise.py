"""`retain advise`: a configuration with reasons, tried if asked for; and whether incoming rows are of a new kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from retain.cli.common import loss_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from retain.advice.advisor import Advice
    from retain.advice.facts import Request
    from retain.advice.incoming import Incoming
    from retain.advice.piloting import Pilot


def command(
    data: Annotated[list[str], typer.Option("--data", "-d", help="What to learn; may be repeated.")] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option("--model", "-m", help="starter, a folder, or a hub id.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB for training; what is free here by default.")] = None,
    old: Annotated[str | None, typer.Option(help="Rows that stand for old data, or none.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Keep no text of the rows.")] = None,
    tasks: Annotated[int | None, typer.Option(min=0, help="Tasks that will come after these.")] = None,
    serve: Annotated[str | None, typer.Option(help="How it will be used: adapters, merged or any.")] = None,
    lose_at_most: Annotated[float | None, loss_option("--lose-at-most", "Largest loss of the old abilities.")] = None,
    similarity: Annotated[float | None, typer.Option(help="Of new rows to what is known, 0 to 1; measured.")] = None,
    price: Annotated[float | None, typer.Option(help="Of an hour of this machine, to show what a run costs.")] = None,
    trial: Annotated[bool, typer.Option("--trial/--no-trial", help="Try a few real steps.")] = True,
    pilot: Annotated[bool, typer.Option("--pilot", help="Run the three best recipes briefly, and compare.")] = False,
    pilot_steps: Annotated[int, typer.Option(min=1, help="Steps of each task in a pilot.")] = 20,
    pilot_items: Annotated[int, typer.Option(min=2, help="Items of every probe in a pilot.")] = 8,
    pilot_folder: Annotated[
        str, typer.Option(help="Runs of the pilot; the same command goes on there.")
    ] = "runs/pilot",
    output: Annotated[str | None, typer.Option("--output", help="File to write; advice.yaml by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    incoming: Annotated[str | None, typer.Option(help="New rows: are they of a kind that was --seen?")] = None,
    seen: Annotated[list[str], typer.Option(help="A run or a file; may be repeated.")] = [],  # noqa: B006
    refresh: Annotated[str | None, typer.Option(help="General rows: draw --rows that were not --seen.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows to read (--incoming) or to draw (--refresh).")] = None,
    json_: Annotated[bool, typer.Option("--json", help="--incoming: print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of samples, folds and draws.")] = 0,
) -> None:
    """Advise a configuration for data and a model, with reasons; measures what can be measured.

    At a terminal it asks for what was not given; otherwise the defaults are taken, and said.

    retain advise --data data/medical.jsonl --old none --pilot

    retain advise --incoming data/new.jsonl --seen runs/medical        (exit code 0: the same kind; 1: not)

    retain advise --refresh general.jsonl --rows 500 --seen runs/medical --output fresh.jsonl
    """
    from retain.errors import ConfigError

    about_run = {"--data": data, "--memory": memory, "--old": old, "--private": private, "--tasks": tasks,
                 "--serve": serve, "--lose-at-most": lose_at_most, "--pilot": pilot}  # fmt: skip
    if incoming is not None and refresh is not None:
        raise ConfigError("advise: --incoming and --refresh are two questions. Ask them one by one.")
    if incoming is not None or refresh is not None:
        which = "--incoming" if incoming is not None else "--refresh"
        if idle := [name for name, value in about_run.items() if value]:
            raise ConfigError(f"{idle[0]}: has no effect with {which}. Leave it out.")
    elif idle := [name for name, value in {"--seen": seen, "--rows": rows, "--json": json_}.items() if value]:
        raise ConfigError(f"{idle[0]}: belongs to --incoming or --refresh. Give one of them, or leave it out.")
    if incoming is not None:
        raise typer.Exit(0 if _incoming(incoming, seen, model, rows, json_, seed, output, force) else 1)
    if refresh is not None:
        if json_ or model:
            raise ConfigError(f"{'--json' if json_ else '--model'}: has no effect with --refresh. Leave it out.")
        _refresh(refresh, rows, seen, seed, output, force)
        return
    from pathlib import Path

    from retain.cli.common import console, quiet_libraries, quietly

    out, path = console(), Path(output or "advice.yaml").expanduser()
    if path.exists() and not force:
        raise ConfigError(f"{path}: is there already, and is not written over. Give another --output, or --force.")
    request = _asked(
        {"data": data or None, "model": model, "memory": memory, "old": old, "private": private, "later": tasks,
         "serve": serve, "lose_at_most": lose_at_most},
        quietly(out),
    )  # fmt: skip
    quiet_libraries()
    from dataclasses import replace

    from retain.advice.advisor import advise, write

    request = replace(request, similarity=similarity, price=price, trial=trial, seed=seed)
    with out.status("looking at the data …") as status:
        advice = advise(request, lambda line: status.update(f"{line} …"))
    found = None
    if pilot:
        from retain.advice.piloting import pilot as run_pilot

        found = run_pilot(advice, Path(pilot_folder), pilot_steps, pilot_items, say=quietly(out))
        advice = advice.with_recipe(found.lines[0].recipe)
    out.print(_table(advice))
    for note in advice.notes:
        out.print(f"  {note}", style="dim", markup=False, highlight=False)
    if found is not None:
        out.print(_lines(found))
        if not found.clear:
            out.print("  The intervals of the first two overlap: their order may be chance.", style="dim")
    write(advice.text(found.paragraphs() if found else ()), path, force)
    out.print(f"Written: {path}. Next: retain plan {path}, then retain run {path}", highlight=False, markup=False)


#: Setting → (question, default, what is said when nobody can be asked).
_QUESTIONS: dict[str, tuple[str, Any]] = {
    "data": ("What shall be learned? A file, a folder or a hub id; several with spaces", None),
    "model": ("Which model?", "starter"),
    "memory": ("How many GB may training take? 0 for what is free here", 0.0),
    "old": ("Rows that stand for what it could do before: a file, or none", "none"),
    "private": ("Must no text of the rows be kept?", False),
    "later": ("How many tasks will come after these?", 0),
    "serve": ("How will it be used: adapters, merged, any?", "any"),
    "lose_at_most": ("What share of the old abilities may be lost? 0.01 is one point, 0 for no limit", 0.0),
}


def _asked(given: dict[str, Any], say: Callable[[str], None]) -> Request:
    """What was given, asked for at a terminal, and otherwise the defaults, which are said."""
    import sys

    from retain.advice.facts import Request
    from retain.errors import ConfigError

    terminal = sys.stdin.isatty()
    answers: dict[str, Any] = {}
    taken = []
    for name, (question, default) in _QUESTIONS.items():
        if given[name] is not None:
            answers[name] = given[name]
        elif terminal:
            answers[name] = _ask(name, question, default)
        elif name != "data":
            answers[name] = default
            taken.append(f"{name.replace('_', ' ')} {_word(name, default)}")
    if taken:
        say(f"Not asked, as this is no terminal; taken: {', '.join(taken)}.")
    data = answers.get("data") or []
    if not data:
        raise ConfigError("advise: nothing to learn. Give --data with a file, a folder or a hub id.")
    for name in ("memory", "lose_at_most"):  # 0 is "no": of a question only
        if given[name] is None:
            answers[name] = answers[name] or None
    answers["data"] = data.split() if isinstance(data, str) else data
    answers["old"] = None if str(answers["old"]).lower() == "none" else answers["old"]
    return Request(**answers)


def _ask(name: str, question: str, default: Any) -> Any:
    from rich.prompt import Confirm, FloatPrompt, IntPrompt, Prompt

    if name == "data":
        return Prompt.ask(question)
    if name == "serve":
        from retain.advice.scenario import SERVE

        return Prompt.ask(question, choices=list(SERVE), default=default)
    kind: Any = {bool: Confirm, float: FloatPrompt, int: IntPrompt}.get(type(default), Prompt)
    return kind.ask(question, default=default)


def _word(name: str, default: Any) -> str:
    named = {"memory": "what is free here", "private": "no", "lose_at_most": "without limit"}
    return named.get(name, str(default))


def _table(advice: Advice) -> Table:
    """Choices with their reasons."""
    from rich.table import Table

    names = ", ".join(name for name, _ in advice.methods)
    table = Table(
        box=None, header_style="dim", pad_edge=False, title=f"{advice.ranking[0]}: {names}", title_style="bold"
    )
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("why", overflow="fold")
    for choice in advice.choices:
        table.add_row(choice.setting, str(choice.value), f"{choice.why} [dim]({choice.source})[/dim]")
    return table


def _lines(found: Pilot) -> Table:
    """The recipes of a pilot, the best first."""
    from rich.table import Table

    from retain.advice.piloting import HEAD

    table = Table(
        box=None, header_style="dim", pad_edge=False, title=f"pilot of {found.steps} steps", title_style="bold"
    )
    for name in HEAD:
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=name == "recipe")
    for line in found.lines:
        table.add_row(*line.cells())
    return table


def _incoming(
    where: str, seen: list[str], model: str | None, rows: int | None, as_json: bool, seed: int, output: str | None,
    force: bool,
) -> bool:  # fmt: skip
    """Compare, show, and say whether the rows are accepted as they are."""
    import json
    from pathlib import Path

    from retain.cli.common import console, quiet_libraries
    from retain.errors import ConfigError

    if not seen:
        raise ConfigError("--incoming: compared with what? Give --seen with a run or a file of rows.")
    quiet_libraries()
    from rich.console import Console

    from retain.advice import incoming as checks
    from retain.advice import seen as before
    from retain.advice.advisor import write
    from retain.advice.reading import Reader, read_sample
    from retain.training.watch import bar

    most = rows or checks.ROWS
    new = read_sample(where, most, seed, "incoming rows")
    sources = [one for place in seen for one in before.samples(place, most, seed)]
    with bar(transient=True, console=Console(stderr=True)) as progress:
        job = progress.add_task("reading rows", total=checks.readings(new, sources), note="")
        reader = Reader(*before.model_of(seen, model))
        found = checks.compare(new, sources, reader, seed=seed, progress=lambda n: progress.update(job, advance=n))
    values = json.dumps(found.as_values(), indent=1)
    if output is not None:
        write(values + "\n", Path(output).expanduser(), force)
    if as_json:
        print(values)
    else:
        out = console()
        out.print(_sources(found))
        colour = "green" if found.accepted else "yellow"
        out.print(f"[bold {colour}]{found.kind}: {found.advice}[/bold {colour}]", highlight=False)
        out.print(f"  {found.why}", style="dim", markup=False, highlight=False)
    return found.accepted


def _sources(found: Incoming) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(f"{found.rows} of {found.total} rows against", overflow="fold")
    for head in ("rows", "told apart", "p", "loss, nats/token", "repeated", ""):
        table.add_column(head, justify="right")
    for one in found.sources:
        loss = "–" if one.loss is None else f"{one.loss.value:+.2f} [{one.loss.low:+.2f}, {one.loss.high:+.2f}]"
        told = f"{one.told.accuracy:.0%} [{one.told.low:.0%}, {one.told.high:.0%}]"
        table.add_row(one.name, str(one.rows), told, f"{one.p:.3g}", loss, f"{one.duplicates:.0%}", one.kind)
    return table


def _refresh(mix: str, rows: int | None, seen: list[str], seed: int, output: str | None, force: bool) -> None:
    from pathlib import Path

    from retain.cli.common import console, quiet_libraries
    from retain.errors import ConfigError

    if rows is None or output is None:
        missing = "--rows" if rows is None else "--output"
        raise ConfigError(f"--refresh: {missing} is missing. Give --rows N and --output FILE.jsonl.")
    path = Path(output).expanduser()
    if path.exists() and not force:
        raise ConfigError(f"{path}: is there already, and is not written over. Give another --output, or --force.")
    quiet_libraries()
    from retain.advice.refreshing import refresh, write_rows

    out = console()
    with out.status("reading the mix …"):
        found = refresh(mix, rows, seen, seed)
    write_rows(found, path, force)
    out.print(f"{path}: {found.sentence()}.", highlight=False, markup=False)
