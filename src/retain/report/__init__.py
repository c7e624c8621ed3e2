"""Show a finished run: `report.html`, `report.md` and tables for the terminal; or several, side by side.

Reads the files of a run directory and nothing else: no model, no network, no torch.

    page.py      report.html, one file             markdown.py  report.md
    figures.py   task matrix, before and after     curves.py    training and forgetting
    canvas.py    colours and SVG of every chart    terminal.py  Rich tables
    wording.py   numbers and verdicts in words     flips.py     items whose answer changed
    compare.py   runs against the first of them    front.py     learned against kept
    judged.py    the verdict in numbers            trend.py     what a monitor saw while training
    labels.py    names of points that cover nothing
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
