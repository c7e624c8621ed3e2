"""`retain compare`: two or more runs on the same base and probes, side by side."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    runs: Annotated[list[str], typer.Argument(help="Run directories; the first is the reference, e.g. the naive run.")],
) -> None:
    """Show what each run learned and kept, on the same items."""
    from pathlib import Path

    from retain.cli.common import console
    from retain.errors import ConfigError
    from retain.report import terminal
    from retain.results import load_results

    if len(runs) < 2:
        raise ConfigError(f"compare: {len(runs)} run given. Give at least two run directories.")
    console().print(terminal.compare(*[load_results(Path(run)) for run in runs]))
