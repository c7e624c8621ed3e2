"""The picture "learned against kept": every run a point with its intervals, and the Pareto front through the best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Affine2D

from retain.report import labels
from retain.report.canvas import BEFORE, INK, LINES, STYLE, Picture, any_script, new_figure, render, short, wide
from retain.report.language import say
from retain.report.wording import percent
from retain.results import Estimate

Place = tuple[float, float]


def pareto(points: Sequence[Place]) -> list[int]:
    """Places of the points that no other one equals or beats on both numbers, the smallest first number first."""

    def beaten(mine: Place) -> bool:
        return any(theirs != mine and theirs[0] >= mine[0] and theirs[1] >= mine[1] for theirs in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


def learned_kept(
    points: Sequence[tuple[str, Estimate, Estimate]],
    unit: str,
    confidence: float = 0.95,
    base: float = 100.0,
    kept_axis: str | None = None,
) -> Picture:
    """Scatter of runs: right is learned more, up is kept more; the base stands at (0, 100 %).

    Args:
        points: label, mean gain on the new tasks, percentage kept of the old abilities; a run's colour is that of
            its place. An interval that is nan is not drawn. A point with the label "" is small, grey and has no
            intervals: one of many that were beaten.
        unit: of the gains, such as "points".
        base: where the base stands, when what is kept is told by another number than a percentage.
        kept_axis: the words for that number.
    """
    places = [(0.0, base), *((learned.value, kept.value) for _, learned, kept in points)]
    best = pareto(places)
    # The boundary of what was reached: going right from one point of the front, what is kept falls at once.
    front = [(min(x for x, _ in places), max(y for _, y in places))]
    for i in best:
        front += [(front[-1][0], places[i][1]), places[i]]
    lines = list(pairwise(front))
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(4.0)
        axes.plot(*zip(*front), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot(*places[0], "D", color=BEFORE, markersize=7)
        for k, (_, learned, kept) in enumerate(points):
            colour, (x, y) = LINES[k % 7], places[k + 1]
            if not points[k][0]:
                axes.plot(x, y, "o", color=BEFORE, markersize=4, markerfacecolor="white", zorder=2)
                continue
            whiskers = [((learned.low, y), (learned.high, y)), ((x, kept.low), (x, kept.high))]
            for whisker, ends in zip(whiskers, "|_"):
                if np.isfinite(whisker).all():
                    axes.plot(*zip(*whisker), color=colour, linewidth=1.2, marker=ends, markersize=5)
                    lines.append(whisker)
            on_front = k + 1 in best
            inner: dict[str, Any] = {"markerfacecolor": colour if on_front else "white", "zorder": 3 + on_front}
            axes.plot(x, y, "o", color=colour, markersize=8, markeredgewidth=1.6, **inner)
        axes.margins(0.08)
        if kept_axis is None:
            axes.set_ylim(min(axes.get_ylim()[0], 80), max(axes.get_ylim()[1], 103))  # a loss of 1 % must not fill it
        axes.grid(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(say("compare.learned_axis", unit=unit))
        axes.set_ylabel(kept_axis or say("compare.kept_axis"))
        with any_script():
            _name(axes, [say("stage.base"), *(short(label, 22) for label, _, _ in points)], places, lines)
    alt = say("compare.alt", percent=percent(f"{100 * confidence:g}"))
    return render(figure, "compare", say("compare.title"), alt)


def _name(axes: Axes, names: Sequence[str], places: Sequence[Place], lines: Sequence[tuple[Place, Place]]) -> None:
    """Write every name beside its point; those that stand far off are joined to it by a line in its colour."""
    figure: Any = axes.figure
    renderer: Any = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # settles the layout
    figure.set_layout_engine("none")
    scale = Affine2D().scale(72 / figure.dpi)  # from pixels to typographic points
    to_points = axes.transData + scale
    shown = [i for i, name in enumerate(names) if name]
    unnamed = [(places[i], places[i]) for i in range(len(places)) if i not in shown]
    colours = [([BEFORE, *(LINES[k % 7] for k in range(len(places) - 1))])[i] for i in shown]
    names, places, lines = [names[i] for i in shown], [places[i] for i in shown], [*lines, *unnamed]
    texts = [
        axes.annotate(name, at, (0, 0), textcoords="offset points", va="bottom") for name, at in zip(names, places)
    ]
    sizes = np.array([text.get_window_extent(renderer).transformed(scale).size for text in texts])
    sizes[:, 0] += np.array([0.4 * float(text.get_fontsize()) * wide(name) for name, text in zip(names, texts)])
    spots = to_points.transform(places)
    inside = axes.get_window_extent(renderer).transformed(scale).get_points()
    boxes = labels.place(spots, sizes, [to_points.transform(line) for line in lines], inside)
    for text, box, spot, colour in zip(texts, boxes, spots, colours):
        text.set_position(tuple(box[0] - spot))
        if labels.distance(box, spot) > labels.JOINED:
            ends = to_points.inverted().transform([spot, labels.nearest(box, spot)])
            axes.plot(*zip(*ends), color=colour, linewidth=0.9, zorder=2)
