"""`retain methods`: the methods by family and the presets, or one of their pages."""

from __future__ import annotations

import re
from typing import Annotated

import typer


def command(name: Annotated[str | None, typer.Argument(help="Show this method's or preset's page.")] = None) -> None:
    """List the methods and presets, or explain one."""
    from rich.table import Table

    from retain import presets
    from retain.cli.common import console
    from retain.errors import ConfigError, unknown
    from retain.methods import FAMILIES, summaries

    out = console()
    known = summaries()
    if name in known:
        out.print(known[name]["doc"], highlight=False, markup=False)
        return
    if name in presets.names():
        out.print(presets.text(name), highlight=False, markup=False)
        return
    if name is not None:
        raise ConfigError(unknown("methods", name, [*known, *presets.names()]))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("method", style="bold", no_wrap=True)
    for head in ("what is kept, and how", "needs", "cost", "source"):
        table.add_column(head, overflow="fold")
    families = dict.fromkeys([*FAMILIES, *sorted(about["family"] for about in known.values())])
    for family in families:
        mine = [key for key, about in known.items() if about["family"] == family]
        if mine:
            table.add_section()
            table.add_row(f"[cyan]{family}[/cyan]", f"[cyan]{FAMILIES.get(family, '')}[/cyan]")
        for key in mine:
            doc = known[key]["doc"]
            sentence = " ".join(doc.partition("\n\n")[0].split()).partition(" — ")[2]
            paper = known[key]["paper"].partition(",")[0]
            table.add_row(key, sentence, part(doc, "Needs"), part(doc, "Cost"), paper)
    out.print(table, highlight=False)
    recipes = Table(box=None, pad_edge=False, header_style="dim")
    recipes.add_column("preset", style="bold", no_wrap=True)
    recipes.add_column("for", overflow="fold")
    for key in presets.names():
        recipes.add_row(key, presets.about(key))
    out.print()
    out.print(recipes, highlight=False)
    out.print("\n[dim]retain methods NAME prints its page; retain run --preset NAME uses a recipe.[/dim]")


def part(doc: str, name: str) -> str:
    """The first sentence of a docstring's part, such as "Cost"; all of it, as what costs most may stand last."""
    found = re.search(rf"^{name}:\s*(.*?)(?=^\w[\w ]*:|\s{{3,}}\w+:|\Z)", doc, re.S | re.M)
    words = " ".join(found[1].split()) if found else ""
    return re.split(r"\.(?:\s|$)", words, maxsplit=1)[0]
