"""`retain run`: learn tasks in order, measured before and after each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from retain.cli.plan import BUDGET, KEEP, configuration

if TYPE_CHECKING:
    from retain.config import RunConfig


def command(
    config: Annotated[str | None, typer.Argument(help="A YAML file. Without one, give --task.")] = None,
    task: Annotated[list[str], typer.Option("--task", "-t", help="Data to learn: file, folder or hub id.")] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option("--model", "-m", help="starter, a folder, or a hub id.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Run directory; runs/<name> by default.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="A recipe by name; see `retain methods`.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help=BUDGET)] = None,
    keep: Annotated[list[str], typer.Option("--keep", help=KEEP)] = [],  # noqa: B006
    set_: Annotated[
        list[str], typer.Option("--set", "-o", help="Override a setting: train.max_steps=20, methods.0.lora.r=8 …")
    ] = [],  # noqa: B006
) -> None:
    r"""Learn tasks in order; probe before and after each; write a report.

    Run the same command again to go on after a stop, or with more tasks at the end of the list.

    [dim]A configuration:[/dim]

        model: starter
        tasks: \[data/medical.jsonl]
        methods: \[lora: {r: 16}, replay: {fraction: 0.3}, distill]
    """
    carry_out(configuration(config, task, model, output, set_, preset, budget, keep))


def carry_out(settings: RunConfig) -> bool:
    """Run, and show what came of it; whether this process is the one that speaks.

    Raises:
        RetainError: as `retain.pipeline.run`.
        typer.Exit: with 1, when a budget was not met.
    """
    from retain.cli.common import console, quiet_libraries, quietly

    quiet_libraries()
    from retain.pipeline import run
    from retain.report import budget, terminal
    from retain.report.language import speaking

    out = console()
    results = run(settings, quietly(out))
    if os.environ.get("RANK", "0") != "0":
        return False  # under torchrun every process comes here; one speaks
    with speaking(settings.language):
        out.print(terminal.summary(results))
        broken = budget.missed(results)
    out.print(f"Report: {settings.directory / 'report.html'}", highlight=False)
    if broken:
        out.print(broken, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    return True
