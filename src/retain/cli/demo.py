"""`retain demo`: see a real model forget, and not forget, within minutes on a CPU."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    output: Annotated[str, typer.Option("--output", help="Folder for both runs.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Seed of data, training and replay.")] = 0,
    rows: Annotated[int | None, typer.Option(help="New rows per task.", min=8, max=1000)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier demo in this folder first.")] = False,
) -> None:
    """Teach the starter model two small jobs, once plainly and once with the default recipe, and compare."""
    import shutil
    import time
    from pathlib import Path

    from retain.cli.common import console, quiet_libraries

    start = time.monotonic()
    folder = Path(output)
    out = console()
    out.rule("[bold]What does a model lose when it learns something new?")
    out.print(
        "SmolLM2-135M-Instruct learns to sort support tickets, then to write down café orders: short, strict\n"
        "formats. First as everybody does it, then with retain's default recipe, on the same rows.\n",
        highlight=False,
    )
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    quiet_libraries()
    from retain import demo
    from retain.report import terminal

    def say(line: str) -> None:
        out.print(line, style="dim", highlight=False, markup=False)

    settings = {"seed": seed} | ({"rows": rows} if rows else {})
    found = demo.run_demo(folder, say, **settings)
    spoken = demo.answers({"naive": folder / "naive", "retained": folder / "retained"})
    out.print()
    out.print(terminal.compare(found.naive, found.retained))
    out.print(demo.sentence(found), highlight=False)
    out.print()
    out.print(terminal.questions(list(demo.QUESTIONS), spoken))
    out.print(f"Report: {found.report}", highlight=False)
    out.print(f"Done in {time.monotonic() - start:.0f} s.", style="dim", highlight=False)
