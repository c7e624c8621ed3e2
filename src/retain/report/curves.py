"""The charts of a report that show time: training loss, and old abilities while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from retain.report import wording
from retain.report.canvas import BEFORE, INK, LINES, RUNS, STYLE, Picture, new_figure, render, short
from retain.report.language import say
from retain.results import Results


def timeline(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step and look records with "at" added: optimizer steps since the start of the run, over all tasks.

    Steps restart with each task. A step that was taken twice (the run was killed and continued) counts once;
    the later record holds.
    """
    steps: dict[tuple[Any, int], dict[str, Any]] = {}
    looks: list[dict[str, Any]] = []
    start, task, furthest = 0, None, 0
    for record in metrics:
        if record.get("kind") == "step" and record.get("step") is not None:
            if record.get("task") != task:
                start, task = furthest, record.get("task")
            at = start + int(record["step"])
            furthest = max(furthest, at)
            steps[task, at] = {**record, "at": at}
        elif record.get("kind") == "look" and record.get("score") is not None:
            looks.append({**record, "at": furthest})
    return sorted(steps.values(), key=lambda record: record["at"]), looks


def thin(xs: Sequence[float], ys: Sequence[float], most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches when there are more points than a chart can show."""
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    if len(x) <= most:
        return x, y
    parts = min(most, len(x))
    return (
        np.array([part.mean() for part in np.array_split(x, parts)]),
        np.array([part.mean() for part in np.array_split(y, parts)]),
    )


def training(
    metrics: Sequence[Mapping[str, Any]],
    others: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = (),
    name: str = "",
) -> Picture | None:
    """Loss by optimizer step, the terms that methods add in a second panel; None without step records."""
    mine = [record for record in timeline(metrics)[0] if _finite(record.get("loss"))]
    if not mine:
        return None
    terms = sorted({key for record in mine for key in record if key.startswith("loss/")})
    with matplotlib.rc_context(STYLE):
        figure, all_axes = new_figure(2.7 + (1.5 if terms else 0), 2 if terms else 1, sharex=True, **_ratios(terms))
        for k, (label, records) in enumerate(others[: len(RUNS) - 1]):
            theirs = [record for record in timeline(records)[0] if _finite(record.get("loss"))]
            _line(all_axes[0], theirs, "loss", RUNS[k + 1], short(label))
        _line(all_axes[0], mine, "loss", RUNS[0], short(name) or say("pictures.this_run"))
        all_axes[0].set_ylabel(say("pictures.loss"))
        if others:
            all_axes[0].legend(fontsize=10.5)
        for k, term in enumerate(terms[: len(LINES) - 1]):
            _line(all_axes[1], mine, term, LINES[(k + 2) % len(LINES)], short(term.removeprefix("loss/")))
        if terms:
            all_axes[1].set_ylabel(say("pictures.terms"))
            all_axes[1].legend(fontsize=10.5)
        _tasks(all_axes, mine)
        all_axes[-1].set_xlabel(say("pictures.step"))
    first, last = (f"{record['loss']:.3g}" for record in (mine[0], mine[-1]))
    alt = say("pictures.training_alt", first=first, last=last, steps=mine[-1]["at"])
    return render(figure, "training", say("pictures.training"), alt)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _ratios(terms: Sequence[str]) -> dict[str, Any]:
    return {"height_ratios": [2, 1]} if terms else {}


def _line(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, colour: str, label: str) -> None:
    found = [record for record in records if _finite(record.get(key))]
    x, y = thin([record["at"] for record in found], [record[key] for record in found])
    # A label that starts with "_" is dropped by matplotlib's legend.
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=1.6,
        label=label.lstrip("_") or "run",
        marker="o" if len(x) < 3 else None,
    )
    axes.grid(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)


def _tasks(all_axes: Sequence[Axes], records: Sequence[Mapping[str, Any]]) -> None:
    """Where each task begins, named on top."""
    starts: dict[str, float] = {}
    for record in records:
        starts.setdefault(str(record.get("task") or ""), record["at"])
    if len(starts) < 2:
        return
    for place, (task, at) in enumerate(starts.items()):
        for axes in all_axes:
            if place:
                axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        across = all_axes[0].get_xaxis_transform()
        if len(starts) <= 5:
            all_axes[0].text(at, 1.02, " " * bool(place) + short(task, 14), transform=across, fontsize=10, va="bottom")


def kept_curves(results: Results, metrics: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[int, float]], str]:
    """Reference probes over training, as a percentage of the base, and what the steps are.

    For a perplexity the number is 2 − after/before, as in `Change.retention`; for a share where lower is better
    it is that of 1 − score. Not capped at 100, so that a curve shows gains too. Looks come from `metrics.jsonl`;
    without two of them, stages are the looks.

    Returns:
        probe → {step: percent}, and "optimizer step" or "stage".
    """
    looks, unit = timeline(metrics)[1], "optimizer step"
    if len({record["at"] for record in looks}) < 2:
        unit = "stage"
        looks = [
            {"probe": probe, "score": estimate.value, "at": place}
            for place, stage in enumerate(results.stages)
            for probe, estimate in results.scores.get(stage, {}).items()
        ]
    base = results.scores.get(results.stages[0], {}) if results.stages else {}
    curves: dict[str, dict[int, float]] = {}
    for info in (info for info in results.probes if info.role == "reference" and info.name in base):
        found = {record["at"]: float(record["score"]) for record in looks if record.get("probe") == info.name}
        if unit == "optimizer step":
            found = {0: base[info.name].value} | found
        start = base[info.name].value
        if wording.is_share(info) and not info.higher_is_better:
            start, found = 1 - start, {at: 1 - value for at, value in found.items()}
        rises = info.higher_is_better or wording.is_share(info)
        if len(found) > 1 and start > 0:
            curves[info.name] = {
                at: 100 * (value / start if rises else max(0.0, 2 - value / start)) for at, value in found.items()
            }
    return curves, unit


def _mean_curve(curves: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    shared = sorted(set.intersection(*(set(curve) for curve in curves.values()))) if curves else []
    return {at: sum(curve[at] for curve in curves.values()) / len(curves) for at in shared}


def forgetting(
    results: Results,
    metrics: Sequence[Mapping[str, Any]],
    others: Sequence[tuple[str, Results, Sequence[Mapping[str, Any]]]] = (),
) -> Picture | None:
    """`kept_curves` of a run, their mean, and the mean of compared runs; None with fewer than two looks."""
    curves, unit = kept_curves(results, metrics)
    if not curves:
        return None
    last = {probe: list(curve.values())[-1] for probe, curve in curves.items()}
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(2.9 + 0.2 * ((min(len(curves), 7) + len(others) + 2) // 2))
        axes.axhline(100, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        for k, probe in enumerate(sorted(curves, key=lambda probe: last[probe])):
            style: dict[str, Any] = {"color": LINES[k], "label": short(probe, 20)} if k < 7 else {"color": BEFORE}
            curve = curves[probe]
            axes.plot(list(curve), list(curve.values()), linewidth=1.2, marker="o", markersize=2.5, **style)
        mean = _mean_curve(curves)
        if len(mean) > 1 and (len(curves) > 1 or others):
            axes.plot(list(mean), list(mean.values()), color=INK, linewidth=3, label=say("pictures.mean"))
        for k, (label, theirs, records) in enumerate(others[: len(RUNS) - 1]):
            found, their_unit = kept_curves(theirs, records)
            mean = _mean_curve(found)
            if len(mean) > 1 and their_unit == unit:
                line: dict[str, Any] = {"color": RUNS[k + 1], "linewidth": 3, "linestyle": (0, (3, 1.2))}
                axes.plot(list(mean), list(mean.values()), label=say("pictures.mean_of", name=short(label, 14)), **line)
        axes.grid(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)
        low, high = axes.get_ylim()
        # A loss of one percent must not fill the chart.
        axes.set_ylim(min(low, 80), max(high, 106))
        axes.set_ylabel(say("pictures.kept_axis"))
        axes.set_xlabel(say("pictures.stage" if unit == "stage" else "pictures.step"))
        if unit == "stage":
            turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(results.stages) > 3 else {}
            axes.set_xticks(range(len(results.stages)), [short(stage, 14) for stage in results.stages], **turned)
        figure.legend(loc="outside lower left", ncols=2, fontsize=10.5, handlelength=1.4)
    worst = min(last, key=lambda probe: last[probe])
    alt = say(
        "pictures.forgetting_alt",
        probes=say("count.reference_probes", n=len(curves)),
        name=short(worst),
        value=wording.percent(f"{last[worst]:.0f}"),
    )
    return render(figure, "forgetting", say("pictures.forgetting"), alt)
