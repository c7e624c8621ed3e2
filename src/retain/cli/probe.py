"""`retain probe`: measure a model, without training anything."""

from __future__ import annotations

from typing import Annotated

import typer

CORE = ["core"]


def command(
    model: Annotated[str, typer.Argument(help="starter, a folder with a model or adapter, a run, or a hub id.")],
    probes: Annotated[
        list[str], typer.Option("--probes", "-p", help="A built-in suite, a file, a folder, or lm_eval:TASK.")
    ] = CORE,
    limit: Annotated[int | None, typer.Option(help="At most this many items per probe.")] = None,
    items: Annotated[str | None, typer.Option(help="Write every item to this Parquet file.")] = None,
) -> None:
    """Ask a model the probes and print its scores with 95 % intervals."""
    from pathlib import Path

    from retain.cli.common import answers, console, quiet_libraries, quietly

    quiet_libraries()
    from rich.table import Table

    from retain import analysis
    from retain.measuring import open_probes
    from retain.report.retention import EVERY, pooled
    from retain.results import save_items
    from retain.totals import totals

    out = console()
    chosen = open_probes(probes, limit, quietly(out))
    rows = answers(model, chosen, out)
    if items:
        save_items(rows, Path(items))
    table = Table("probe", "group", "metric", "items", "score", "95 %", "chance", title=f"{model}")
    for probe in chosen:
        info = probe.info("reference")
        found = analysis.score([r for r in rows if r["probe"] == probe.name], info)
        chance = "" if info.chance is None else f"{info.chance:.2f}"
        table.add_row(
            probe.name, probe.group, info.metric, str(info.items), f"{found.value:.3f}",
            f"{found.low:.3f} – {found.high:.3f}", chance,
        )  # fmt: skip
    infos = [probe.info("reference") for probe in chosen]
    if (every := pooled(infos, rows)) is not None:
        found = analysis.score(every[1], every[0])
        table.add_section()
        spread = f"{found.low:.3f} – {found.high:.3f}"
        table.add_row(EVERY, "", every[0].metric, str(every[0].items), f"{found.value:.3f}", spread, "")
    out.print(table)
    for probe in chosen:
        others = totals([r for r in rows if r["probe"] == probe.name])
        if others.numbers:
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in others.numbers.items() if name != "accuracy")
            out.print(f"{probe.name}: {numbers}", highlight=False)
        for label, of_class in others.classes.items():
            out.print(
                f"  {label}: precision {of_class.precision:.3f}, recall {of_class.recall:.3f}, F1 {of_class.f1:.3f}, "
                f"of {of_class.items}",
                highlight=False,
                markup=False,
            )
    if items:
        out.print(f"Items: {items}")
