"""The charts of a report that show scores: the task matrix, and every probe before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from retain.report import budget_figures, language, wording
from retain.report.canvas import BEFORE, INK, RUNS, STYLE, Picture, new_figure, render, short
from retain.report.curves import forgetting, training
from retain.report.language import say
from retain.report.trend import trend
from retain.results import Estimate, ProbeInfo, Results

NAME, BAR = 0.25, 0.165  # inches that the name of a probe and each of its bars take


def draw(
    results: Results,
    metrics: Sequence[Mapping[str, Any]],
    others: Sequence[tuple[str, Results, Sequence[Mapping[str, Any]]]] = (),
) -> list[Picture]:
    """Every chart for which there are data.

    Args:
        results: the run.
        metrics: its records of `metrics.jsonl`, oldest first.
        others: (label, results, metrics) of runs to draw over it.
    """
    pictures = [
        matrix(results),
        scores(results, [(label, theirs) for label, theirs, _ in others]),
        forgetting(results, metrics, others),
        trend(metrics),
        training(metrics, [(label, records) for label, _, records in others], results.name),
    ]
    return [*(picture for picture in pictures if picture is not None), *budget_figures.draw(results, metrics)]


def matrix(results: Results) -> Picture | None:
    """Heat map of the task matrix: rows are stages (base first), columns tasks; None without tasks."""
    if not results.tasks or not results.matrix:
        return None
    values = np.array([[np.nan if v is None else v for v in row] for row in results.matrix], dtype=float)
    rows, columns = values.shape
    finite = values[np.isfinite(values)]
    shares = finite.size > 0 and finite.min() >= 0 and finite.max() <= 1
    low, high = (0.0, 1.0) if shares or finite.size == 0 else (float(finite.min()), float(finite.max()))
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(0.9 + 0.42 * rows)
        colours = matplotlib.colormaps["cividis"].with_extremes(bad=(0.5, 0.5, 0.5, 0.12))
        edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
        axes.pcolormesh(*edges, np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=max(high, low + 1e-9))
        axes.invert_yaxis()
        size = float(np.clip(70 / columns, 6, 11.5))
        for i in range(rows):
            for j in range(columns):
                value = values[i, j]
                text = "–" if not np.isfinite(value) else f"{100 * value:.0f}" if shares else f"{value:.3g}"
                back = colours((value - low) / max(high - low, 1e-9)) if np.isfinite(value) else None
                colour = INK if back is None else "black" if luminance(back) > 0.179 else "white"
                weight = "bold" if i == j + 1 else "normal"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size, fontweight=weight)
        tasks = [short(task, 14 if columns > 3 else 36 // columns) for task in results.tasks[:columns]]
        turned: dict[str, Any] = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if columns > 3 else {}
        axes.xaxis.tick_top()
        axes.set_xticks(range(columns), tasks, **turned)
        after = [say("stage.after", task=short(task, 14)) for task in results.tasks[: rows - 1]]
        axes.set_yticks(range(rows), [say("stage.base"), *after])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xticks(np.arange(1, columns) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, rows) - 0.5, minor=True)
        axes.grid(which="minor", color=(0.5, 0.5, 0.5, 0.4), linewidth=1)
        axes.tick_params(which="minor", length=0)
    alt = say("pictures.matrix_alt", unit=say("pictures.in_percent" if shares else "pictures.in_metric"))
    return render(figure, "matrix", say("pictures.matrix"), alt)


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2); above 0.179 black text has the higher contrast."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _bars(
    axes: Axes,
    infos: Sequence[ProbeInfo],
    series: Sequence[tuple[str, str, Mapping[str, Estimate]]],
    factor: float,
) -> None:
    """Horizontal bars with intervals; the name stands above its bars, so that a phone has room for both."""
    slot = NAME + BAR * len(series)
    thick, top = BAR / slot, NAME / slot - 0.5
    for place, info in enumerate(infos):
        axes.text(0, place + top - 0.01 / slot, short(info.name, 44), va="bottom", ha="left", fontsize=11)
        for k, (_, colour, found) in enumerate(series):
            estimate = found.get(info.name)
            if estimate is None:
                continue
            y = place + top + thick * (k + 0.5)
            value, low, high = (factor * v for v in (estimate.value, estimate.low, estimate.high))
            axes.barh(y, value, height=thick * 0.9, color=colour, alpha=0.9)
            span = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.errorbar(value, y, xerr=span, color=INK, linewidth=1.1, capsize=2.2, capthick=1.1)
            text = f"{value:.0f}" if factor == 100 else f"{value:.3g}"
            axes.annotate(text, (high, y), (4, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_ylim(len(infos) - 0.42, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)
    axes.set_axisbelow(True)


def scores(results: Results, others: Sequence[tuple[str, Results]] = ()) -> Picture | None:
    """Bars of every probe before and after, with intervals; plain numbers (perplexity) on an axis of their own."""
    if not results.stages or not results.probes:
        return None
    base, last = (results.scores.get(stage, {}) for stage in (results.stages[0], results.stages[-1]))
    series = [(say("pictures.before"), BEFORE, base)]
    if len(results.stages) == 1:
        series = [(say("pictures.score"), RUNS[0], base)]
    else:
        series.append((say("pictures.after") if not others else short(results.name), RUNS[0], last))
    for k, (label, theirs) in enumerate(others[: len(RUNS) - 1]):
        series.append((short(label), RUNS[k + 1], theirs.scores.get(theirs.stages[-1], {})))
    groups = list(dict.fromkeys(info.group for info in results.probes))
    ordered = sorted(results.probes, key=lambda info: (info.role != "task", groups.index(info.group)))
    panels = [[info for info in ordered if wording.is_share(info) == share] for share in (True, False)]
    panels = [panel for panel in panels if panel]
    slot = NAME + BAR * len(series)
    heights = [slot * len(panel) + 0.55 for panel in panels]
    with matplotlib.rc_context(STYLE):
        figure, all_axes = new_figure(sum(heights) + 0.4, len(panels), height_ratios=heights)
        for axes, panel in zip(all_axes, panels):
            share = wording.is_share(panel[0])
            _bars(axes, panel, series, 100 if share else 1)
            if share:
                axes.set_xlim(0, 112)
                axes.set_xticks(range(0, 101, 20))
                axes.set_xlabel(say("pictures.score_axis"))
            else:
                low, high = axes.get_xlim()
                axes.set_xlim(min(0, low), max(high, 0.001) * 1.1)
                lower = say("pictures.lower") if not any(info.higher_is_better for info in panel) else ""
                metrics = sorted({language.name("metric", info.metric) for info in panel})
                axes.set_xlabel(say("list.comma").join(metrics) + lower)
        handles = [Patch(color=colour, label=label) for label, colour, _ in series]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=min(len(series), 3),
            handlelength=1.1,
            fontsize=11,
        )
    count = say("count.probes", n=len(results.probes))
    names = say("list.comma").join(label for label, _, _ in series)
    alt = say("pictures.scores_alt", probes=count, series=names, percent=wording.confidence(results))
    return render(figure, "scores", say("pictures.scores" if len(series) > 1 else "pictures.scores_once"), alt)
