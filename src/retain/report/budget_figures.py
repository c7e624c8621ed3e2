"""Two pictures of a budget: how far one may go, and how a training was held back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from retain.report.budget import chosen
from retain.report.canvas import INK, LINES, RUNS, STYLE, Picture, new_figure, render, short
from retain.report.language import say
from retain.report.wording import percent
from retain.results import Budget, BudgetPoint, Results

LIMIT: dict[str, Any] = {"color": LINES[2], "linewidth": 1.4, "linestyle": (0, (4, 3))}


def draw(results: Results, metrics: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Both pictures of every task with a budget, "budget-1", "held-1", …, where there is something to show."""
    several = len(results.budgets) > 1
    pictures = []
    for number, budget in enumerate(results.budgets, 1):
        pictures.append(curve(budget, number, several))
        looks = [r for r in metrics if r.get("kind") == "budget" and r.get("task") == budget.task and "drift" in r]
        pictures.append(held(budget, looks, number, several))
    return [picture for picture in pictures if picture is not None]


def curve(budget: Budget, number: int = 1, several: bool = False) -> Picture | None:
    """Loss by the share of the way: means with intervals, upper bounds, the budget, and what was kept.

    Points and nats have a panel each. None without points.
    """
    points = sorted(budget.points, key=lambda point: point.share)
    panels = [key for key in ("loss", "nats") if any(getattr(point, key) is not None for point in points)]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure, all_axes = new_figure(0.6 + 2.3 * len(panels), len(panels), sharex=True)
        for axes, panel in zip(all_axes, panels):
            _lost(axes, budget, points) if panel == "loss" else _lost_nats(axes, budget, points)
            axes.grid(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)
            axes.set_ylim(min(axes.get_ylim()[0], 0), axes.get_ylim()[1])
        all_axes[-1].set_xlim(0, 104)
        all_axes[-1].set_xlabel(say("budget.axis_share"))
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=10.5, handlelength=1.4)
    where = say("budget.chosen_at", share=percent(f"{100 * budget.share:.3g}"))
    limit = say("budget.points", n=round(100 * budget.lose_at_most, 6))
    if panels == ["nats"]:
        limit = f"{budget.lose_at_most_nats:g} {say('unit.nats_token')}"
    alt = say("budget.picture_alt", limit=limit, chosen=where if budget.feasible else say("budget.chosen_none"))
    return render(figure, f"budget-{number}", _title("budget.picture", "budget.picture_of", budget, several), alt)


def held(budget: Budget, looks: Sequence[Mapping[str, Any]], number: int = 1, several: bool = False) -> Picture | None:
    """Drift against its limit at the looks of one task, and the factor on the strengths; None with fewer than two."""
    found = {int(look["step"]): look for look in looks}  # a look that was taken twice counts once
    if len(found) < 2:
        return None
    steps = sorted(found)
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = new_figure(3.3, 2, sharex=True, height_ratios=[3, 2])
        above.plot(steps, [found[s]["drift"] for s in steps], color=RUNS[0], linewidth=1.6, marker="o", markersize=2.5)
        limits = [found[s].get("limit") for s in steps]
        above.step(steps, [float("nan") if x is None else x for x in limits], where="post", **LIMIT)
        above.set_ylim(bottom=0)
        above.set_ylabel(say("budget.axis_drift"))
        factors = [found[s]["factor"] for s in steps]
        below.step(steps, factors, where="post", color=RUNS[0], linewidth=1.6)
        below.set_yscale("log", base=2)
        least, most = min(0.5, *factors), max(2.0, *factors)
        below.set_ylim(least / 1.2, most * 1.2)
        below.set_yticks([2.0**k for k in range(math.ceil(math.log2(least)), math.floor(math.log2(most)) + 1)])
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.yaxis.set_minor_formatter(NullFormatter())
        below.set_ylabel(say("budget.axis_factor"))
        below.set_xlabel(say("pictures.step"))
        for axes in (above, below):
            axes.grid(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)
    alt = say("budget.held_alt", n=len(steps), factor=f"{factors[-1]:.3g}")
    return render(figure, f"held-{number}", _title("budget.held", "budget.held_of", budget, several), alt)


def _title(alone: str, one_of_several: str, budget: Budget, several: bool) -> str:
    return say(one_of_several, task=short(budget.task)) if several else say(alone)


def _lost(axes: Axes, budget: Budget, points: Sequence[BudgetPoint]) -> None:
    shown = [(point, point.loss) for point in points if point.loss is not None]
    at = [100 * point.share for point, _ in shown]
    means = [100 * loss.value for _, loss in shown]
    ends = [[100 * max(m - o, 0) for m, o in pairs] for pairs in _whiskers([loss for _, loss in shown])]
    axes.errorbar(at, means, yerr=ends, color=RUNS[0], linewidth=0, elinewidth=1.1, capsize=2.2)
    _series(axes, budget, at, means, [None if p.upper is None else 100 * p.upper for p, _ in shown])
    axes.axhline(100 * budget.lose_at_most, label=say("budget.line_budget"), **LIMIT)
    axes.set_ylabel(say("budget.axis_lost"))


def _whiskers(losses: Sequence[Any]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    return [(loss.value, loss.low) for loss in losses], [(loss.high, loss.value) for loss in losses]


def _lost_nats(axes: Axes, budget: Budget, points: Sequence[BudgetPoint]) -> None:
    shown = [(point, point.nats) for point in points if point.nats is not None]
    _series(axes, budget, [100 * p.share for p, _ in shown], [n for _, n in shown], [p.upper_nats for p, _ in shown])
    axes.axhline(budget.lose_at_most_nats, label=say("budget.line_budget"), **LIMIT)
    axes.set_ylabel(say("budget.axis_nats"))


def _series(
    axes: Axes, budget: Budget, at: Sequence[float], means: Sequence[float], uppers: Sequence[float | None]
) -> None:
    """Means and bounds; what was kept has a larger dot."""
    axes.plot(at, means, "o-", color=RUNS[0], linewidth=0.9, markersize=4, label=say("budget.line_mean"))
    bounds = [(x, y) for x, y in zip(at, uppers) if y is not None]
    if bounds:
        axes.plot(*zip(*bounds), "v", color=RUNS[1], markersize=6, label=say("budget.line_bound"))
    here = chosen(budget)
    for x, y in zip(at, means):
        if here is not None and abs(x - 100 * here.share) < 1e-6:
            axes.plot(x, y, "o", color=RUNS[0], markersize=9, markeredgecolor=INK, markeredgewidth=1.2)
