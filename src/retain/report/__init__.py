"""Show a finished run: `report.html`, `report.md` and tables for the terminal; or several, side by side.

Reads the files of a run directory and nothing else: no model, no network, no torch.

    page.py      report.html, one file             markdown.py  report.md
    top.py       the three facts that come first   wording.py   numbers and verdicts in words
    language.py  the words, one table a language   judged.py    the verdict in numbers
    figures.py   task matrix, before and after     curves.py    training and forgetting
    canvas.py    colours and SVG of every chart    labels.py    names of points that cover nothing
    flips.py     items whose answer changed        front.py     learned against kept
    compare.py   runs against the first of them    terminal.py  Rich tables
    gate.py      a limit on forgetting             card.py      a model card for the hub
    changed.py   how the answers changed           dynamics.py  a forgetting curve and its forecast
    retention.py domains, before and after         trend.py     what a monitor saw while training
    totals.py    F1, BLEU, every class             search.py    what a search found

`report.html.j2` takes each section from a file in `parts/`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    # Loaded on use: the command line wants the tables of terminal.py without waiting for matplotlib.
    if name == "write_report":
        from retain.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
