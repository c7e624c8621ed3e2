"""`retain report`: write a run's report again, alone or beside other runs."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    run: Annotated[str, typer.Argument(help="Run directory.")],
    against: Annotated[list[str], typer.Option("--against", "-a", help="Other runs on the same base and probes.")] = [],  # noqa: B006
) -> None:
    """Write report.html and report.md of a run."""
    from pathlib import Path

    from retain.report.page import write_report

    typer.echo(f"Report: {write_report(Path(run), [Path(other) for other in against])}")
