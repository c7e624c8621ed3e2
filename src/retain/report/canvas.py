"""What every chart shares: colours, sizes, the SVG text and its form inside a page.

Colours begin with two of Okabe and Ito's; the others are those that stay furthest apart from all before them, also for
readers who see no red or no green. Text stays text, the background is
transparent and ink is `currentColor`, so that a page shows the charts in its own font, light or dark. The same
input gives the same bytes.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Before is grey; then this run and the runs that it is compared with.
BEFORE = "#9a9a9a"
LINES = ["#0072b2", "#e69f00", "#9f2000", "#00bfff", "#606060", "#9f8040", "#80bf80", BEFORE]
RUNS = LINES[:4]
INK = "#0a0b0c"  # stands for `currentColor`, which matplotlib does not know
WIDTH = 4.6  # inches = 331 units, about the pixels of a phone: text of 11 units stays readable there
STYLE: dict[Any, Any] = {  # matplotlib types the keys as one long list of words
    "svg.fonttype": "none",
    "svg.hashsalt": "retain",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.unicode_minus": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A chart: file name without ending, title, what it shows in words, SVG text for a file."""

    name: str
    title: str
    alt: str
    svg: str

    @property
    def inline(self) -> str:
        """The SVG for inside a page: no XML header, no namespaces, ids of its own, ink of the page."""
        svg = re.sub(r"^.*?(?=<svg)", "", self.svg, flags=re.DOTALL)
        svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
        svg = svg.replace("xlink:href=", "href=").replace('id="', f'id="{self.name}-')
        svg = svg.replace("url(#", f"url(#{self.name}-").replace('href="#', f'href="#{self.name}-')
        svg = re.sub(r'<svg([^>]*?)\swidth="[^"]*"', r"<svg\1", re.sub(r'<svg([^>]*?)\sheight="[^"]*"', r"<svg\1", svg))
        return svg.replace(INK, "currentColor").strip()


def short(text: str, limit: int = 26) -> str:
    """A name on one line that fits a chart."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def any_script() -> Iterator[None]:
    """Text stays text, so that the reader's own fonts show it: that matplotlib's has no Chinese does not matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def wide(text: str) -> int:
    """How many of its characters take the square of a Chinese one; matplotlib measures a narrow box for them."""
    return sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def render(figure: Figure, name: str, title: str, alt: str) -> Picture:
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), any_script():
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    return Picture(name, title, alt, buffer.getvalue())


def new_figure(height: float, rows: int = 1, **layout: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, **layout)
    return figure, list(axes[:, 0])
