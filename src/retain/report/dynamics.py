"""Forgetting as a curve: the looks of a run read for `functional.dynamics`, and the picture of a forecast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retain.errors import RunError, unknown
from retain.results import load_records, write_text

if TYPE_CHECKING:
    from retain.functional.dynamics import Forecast
    from retain.report.canvas import Picture

#: What a monitor record may say, positive = worse; what is asked for first stands first.
MEASURES = {
    "overall": "forgetting",
    "forgetting": "forgetting",
    "loss_rise": "rise of the loss, nats",
    "kl": "drift, nats",
}
#: Looks after step 0 with which a measure is preferred to one that has more.
_ENOUGH = 4
_LOGS = ("metrics.jsonl", "monitor.jsonl")


class Looks(NamedTuple):
    """Forgetting at the looks of a run, in the order of the steps; `unit` says what was measured.

    Without their standard errors: looks of one run ask the same items, and scatter less around a curve than these say.
    """

    steps: list[float]
    forgetting: list[float]
    unit: str


def read_looks(directory: Path, measure: str | None = None) -> Looks:
    """The looks of a run directory that have a step and a number, from `metrics.jsonl` and `monitor.jsonl`.

    Monitor records (`{"kind": "monitor", "step": …, "forgetting": …}`) give a measure as a number or as
    `{"value": …, "low": …, "high": …}`: the first of `MEASURES` that four looks have, else the one that most have.
    Without any, looks of probes (`{"kind": "look", "step": …, "probe": …, "score": …}`) are taken: the mean over the
    probes asked at every step of what their scores, larger being better, have fallen since the first step. Of a step
    taken twice the later record holds; with several tasks steps count on from one to the next.

    Raises:
        RunError: no such directory, another measure, or no such records.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RunError(f"{directory}: no such directory. Give the directory of a run (runs/<name>).")
    if measure is not None and measure not in MEASURES:
        raise RunError(unknown("measure", measure, MEASURES))
    records = _counted_on([record for log in _LOGS for record in load_records(directory / log)])
    monitored = [record for record in records if record.get("kind") == "monitor"]
    found = {name: _series(monitored, name) for name in ([measure] if measure else MEASURES)}
    many = {name: sum(at > 0 for at in series) for name, series in found.items()}
    best = next((name for name, count in many.items() if count >= _ENOUGH), max(many, key=lambda name: many[name]))
    if series := found[best]:
        return Looks(sorted(series), [series[at] for at in sorted(series)], MEASURES[best])
    steps, lost = _fallen(records) if measure is None else ([], [])
    if not steps:
        raise RunError(
            f"{directory}: no looks with a step{f' and {measure}' if measure else ''} in {' or '.join(_LOGS)}. "
            "Give a run that was watched while it trained."
        )
    return Looks(steps, lost, "mean loss of the probes' scores")


def _series(records: Sequence[Mapping[str, Any]], name: str) -> dict[float, float]:
    """Step → a measure; the later record of a step holds."""
    given = {record["at"]: record.get(name) for record in records}
    numbers = {at: _number(value.get("value") if isinstance(value, dict) else value) for at, value in given.items()}
    return {at: value for at, value in numbers.items() if value is not None}


def _counted_on(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records with a step, with "at" added: steps since the start of the run, over all tasks."""
    found: list[dict[str, Any]] = []
    starts: dict[Any, float] = {}
    furthest = 0.0
    for record in metrics:
        step = _number(record.get("step"))
        if step is None or record.get("kind") not in ("step", "look", "monitor"):
            continue
        at = starts.setdefault(record.get("task"), furthest) + step
        furthest = max(furthest, at)
        found.append({**record, "at": at})
    return found


def _fallen(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    scores: dict[float, dict[str, float]] = {}
    for record in records:
        value = _number(record.get("score"))
        if record.get("kind") == "look" and value is not None:
            scores.setdefault(record["at"], {})[str(record.get("probe"))] = value
    shared = sorted(set.intersection(*map(set, scores.values()))) if scores else []
    if not shared or len(scores) < 2:
        return [], []
    steps = sorted(scores)
    base = scores[steps[0]]
    return steps, [sum(base[p] - scores[at][p] for p in shared) / len(shared) for at in steps]


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def picture(
    curve: Sequence[tuple[float, float]],
    looks: Sequence[tuple[float, float]] = (),
    forecasts: Sequence[Forecast] = (),
    across: str = "optimizer step",
    up: str = "share lost",
) -> Picture:
    """The curve, the looks that it was fitted to, and the band of the forecasts."""
    import matplotlib

    from retain.report.canvas import BEFORE, RUNS, STYLE, new_figure, render

    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(2.7)
        axes.grid(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)
        if forecasts:
            low, high = [f.low for f in forecasts], [f.high for f in forecasts]
            axes.fill_between([f.step for f in forecasts], low, high, color=RUNS[0], alpha=0.2, linewidth=0)
        axes.plot([x for x, _ in curve], [y for _, y in curve], color=RUNS[0], linewidth=1.8, label="curve")
        if looks:
            axes.plot([x for x, _ in looks], [y for _, y in looks], "o", color=BEFORE, markersize=4, label="looks")
            axes.legend(fontsize=10.5)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    end = forecasts[-1] if forecasts else None
    said = f", interval {end.low:.3g} to {end.high:.3g}" if end else ""
    alt = f"{up.capitalize()} by {across}: {curve[-1][1]:.3g} at {curve[-1][0]:g}{said}."
    return render(figure, "dynamics", "Forgetting while training", alt)


def write(drawn: Picture, path: Path) -> None:
    """Write a picture as .svg, in an ink seen on white and on black, or as a page of its own (.html)."""
    from retain.report.canvas import INK

    if path.suffix == ".svg":
        text = drawn.svg.replace(INK, "#767676")
    else:
        text = (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{drawn.title}</title>\n'
            "<style>:root{color-scheme:light dark}body{font-family:sans-serif;max-width:48rem;margin:2rem auto}"
            "svg{width:100%;height:auto}</style>\n"
            f"<h1>{drawn.title}</h1>\n<figure>{drawn.inline}\n<figcaption>{drawn.alt}</figcaption></figure>\n</html>\n"
        )
    write_text(path, text)
