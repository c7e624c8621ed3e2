"""The chart of what a monitor saw while a model trained: forgetting overall and by probe, and drift from the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from retain.errors import RunError
from retain.report import wording
from retain.report.canvas import BEFORE, INK, LINES, RUNS, STYLE, Picture, new_figure, render, short
from retain.report.language import say
from retain.results import load_records, write_text


def watched(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The monitor's records with "at" added: optimizer steps since the start of the run, over all tasks.

    A look that was taken twice (the run was killed and continued) counts once; the later record holds.
    """
    found: dict[tuple[Any, int], dict[str, Any]] = {}
    start, task, furthest = 0, None, 0
    for record in metrics:
        if record.get("kind") not in ("step", "monitor") or record.get("step") is None:
            continue
        if record.get("task") != task:
            start, task = furthest, record.get("task")
        at = start + int(record["step"])
        furthest = max(furthest, at)
        if record["kind"] == "monitor":
            found[task, at] = {**record, "at": at}
    return sorted(found.values(), key=lambda record: record["at"])


def trend(metrics: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Forgetting overall, with its interval, and of each probe; below it the divergence from the base.

    Looks without probes have the divergence alone. None with fewer than two looks.
    """
    looks = watched(metrics)
    if len(looks) < 2:
        return None
    asked = [look for look in looks if "forgetting" in look]
    probes = _curves(asked)
    with matplotlib.rc_context(STYLE):
        shown = min(len(probes), 7)
        height = 1.9 + (1.7 + 0.1 * (shown + 2) if asked else 0)
        ratios: dict[str, Any] = {"height_ratios": [2, 1]} if asked else {}
        figure, all_axes = new_figure(height, 2 if asked else 1, sharex=True, **ratios)
        if asked:
            _forgetting(all_axes[0], asked, probes)
            figure.legend(loc="outside lower left", ncols=2, fontsize=10.5, handlelength=1.4)
        _band(all_axes[-1], looks, "kl", RUNS[0])
        all_axes[-1].set_ylim(bottom=0)
        all_axes[-1].set_ylabel(say("trend.kl"))
        all_axes[-1].set_xlabel(say("trend.step"))
        for axes in all_axes:
            axes.grid(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)
            for look in looks:
                if any(word not in ("warn", "checkpoint") for word in look.get("did", ())):
                    axes.axvline(look["at"], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    last = looks[-1]
    parts = [say("trend.looks", n=len(looks))]
    if asked:
        share = wording.percent(f"{100 * asked[-1]['forgetting']['value']:.0f}")
        parts.append(say("trend.forgotten", step=asked[-1]["at"], share=share))
    parts.append(say("trend.drift", kl=wording.number(last["kl"]["value"], 3), step=last["at"]))
    if any("raise" in look.get("did", ()) or "stop" in look.get("did", ()) for look in looks):
        parts.append(say("trend.acted"))
    return render(figure, "trend", say("trend.title"), say("trend.between").join(parts))


def write_trend(log: str | Path, path: str | Path) -> Path:
    """Draw a monitor's log (`monitor.jsonl`, or a run's `metrics.jsonl`) into an SVG file; returns its path.

    Raises:
        RunError: the log has fewer than two looks.
    """
    picture = trend(load_records(Path(log)))
    if picture is None:
        raise RunError(f"{log}: fewer than two looks of a monitor. Give the log of a training that was watched.")
    write_text(Path(path), picture.svg.replace(INK, "#767676"))
    return Path(path)


def _curves(asked: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Old probe → {step: forgetting in percent}, the most forgotten at the end first."""
    curves: dict[str, dict[int, float]] = {}
    for look in asked:
        for name, one in look.get("probes", {}).items():
            if one["role"] == "reference":
                curves.setdefault(name, {})[look["at"]] = 100 * one["forgetting"]
    return dict(sorted(curves.items(), key=lambda curve: -list(curve[1].values())[-1]))


def _forgetting(axes: Axes, asked: Sequence[Mapping[str, Any]], probes: Mapping[str, Mapping[int, float]]) -> None:
    for k, (name, curve) in enumerate(probes.items()):
        style: dict[str, Any] = (
            {"color": LINES[k], "label": short(name, 20).lstrip("_")} if k < 7 else {"color": BEFORE}
        )
        axes.plot(list(curve), list(curve.values()), linewidth=1.2, marker="o", markersize=2.5, **style)
    _band(axes, asked, "forgetting", INK, 100, linewidth=3, label=say("trend.overall"))
    low, high = axes.get_ylim()
    axes.set_ylim(max(min(low, -2), -50), min(max(high, 10), 105))
    axes.set_ylabel(say("trend.axis"))


def _band(
    axes: Axes, looks: Sequence[Mapping[str, Any]], key: str, colour: str, times: float = 1, **style: Any
) -> None:
    at = [look["at"] for look in looks]
    value, low, high = (
        [times * look[key].get(end, look[key]["value"]) for look in looks] for end in ("value", "low", "high")
    )
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(at, value, color=colour, marker="o", markersize=2.5, **({"linewidth": 1.6} | style))
