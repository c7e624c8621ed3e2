"""`retain report`: write a run's report again, hold it to a limit on forgetting, write a model card."""

from __future__ import annotations

from typing import Annotated

import typer

from retain.cli.common import loss_option


def _schema(wanted: bool) -> None:
    if wanted:
        import json

        from retain.results import json_schema

        print(json.dumps(json_schema(), indent=1))
        raise typer.Exit


def command(
    run: Annotated[str, typer.Argument(help="Run directory; its results.json alone is enough for a limit or a card.")],
    against: Annotated[list[str], typer.Option("--against", "-a", help="Other runs on the same base and probes.")] = [],  # noqa: B006
    lang: Annotated[str | None, typer.Option("--lang", help="Language: en or zh; that of the run by default.")] = None,
    fail_over: Annotated[float | None, loss_option("--fail-over", "Exit with 1 when more than this was lost.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 as well when there are too few items.")] = False,
    card: Annotated[str | None, typer.Option("--card", help="Write a model card for the hub to this file.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", is_eager=True, callback=_schema, help="Print the JSON Schema of results.json.")
    ] = False,
) -> None:
    """Write report.html and report.md of a run; hold it to a limit on forgetting; write a model card.

    With --fail-over one line says "kept" (the upper bound of the loss is within the limit), "lost" (the lower bound
    is above it; exit 1) or "not enough items to tell" (a warning, with --strict exit 1).
    """
    from pathlib import Path

    from retain.cli.common import language_of
    from retain.errors import ConfigError
    from retain.results import load_results

    place = Path(run)
    if strict and fail_over is None:
        raise ConfigError("--strict: without a limit it has no effect. Give one with --fail-over.")
    alone = place.is_file()
    if alone and (against or (fail_over is None and card is None)):
        raise ConfigError(
            f"report: {run} is a file; a page needs the run directory. Give it, or --fail-over or --card."
        )
    if lang is None:
        lang = language_of(place.parent if alone else place)
    if not alone:
        from retain.report.page import write_report

        typer.echo(f"Report: {write_report(place, [Path(other) for other in against], lang)}")
    if card is not None:
        from retain.report.card import write

        typer.echo(f"Model card: {write(load_results(place), Path(card), lang)}")
    if fail_over is not None:
        from retain.report.gate import check
        from retain.report.language import speaking

        with speaking(lang):
            gate = check(load_results(place), fail_over)
            typer.echo(gate.said)
        if gate.fails(strict):
            raise typer.Exit(1)
