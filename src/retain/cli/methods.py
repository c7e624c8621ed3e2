"""`retain methods`: the methods by family, or one method's page."""

from __future__ import annotations

from typing import Annotated

import typer


def command(name: Annotated[str | None, typer.Argument(help="Show this method's page.")] = None) -> None:
    """List the methods, or explain one."""
    from rich.table import Table

    from retain.cli.common import console
    from retain.errors import ConfigError, unknown
    from retain.methods import summaries

    out = console()
    known = summaries()
    if name is not None:
        if name not in known:
            raise ConfigError(unknown("methods", name, known))
        out.print(known[name]["doc"], highlight=False, markup=False)
        return
    table = Table("method", "family", "what is kept, and how", "source")
    for key, about in sorted(known.items(), key=lambda item: (item[1]["family"], item[0])):
        sentence = about["doc"].splitlines()[0].partition(" — ")[2]
        table.add_row(key, about["family"], sentence, about["paper"])
    out.print(table)
