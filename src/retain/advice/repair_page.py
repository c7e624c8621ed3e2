"""What a repair found, shown: a table for the terminal, `repair.md`, the picture, and the page that compares points."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from retain.advice.repair import Repair, Repairing
from retain.advice.repair_choice import HELD, NOTABLE, Point, Sides
from retain.outcome import numbers
from retain.report import compare, front, markdown
from retain.report.canvas import INK, Picture
from retain.results import Estimate, Results, Sequence, Thresholds, load_items, save_items, save_results, write_text

HEAD = ("move", "point", "lost", "of the lost ability is back", "learned", "of the learned is there")


def amount(found: Estimate, unit: str = "points") -> str:
    """A difference with its interval."""
    factor = 100 if unit == "points" else 1
    value, low, high = (f"{factor * x + 0:.{1 if factor == 100 else 3}f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def share(found: Estimate | None) -> str:
    """A share with its interval in percent; a dash where it is not certain that there is anything to share."""
    return "–" if found is None else f"{100 * found.value:.0f} % [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def shown(found: Repair) -> list[Point]:
    """The tuned model, the best point of every move by the control half, and the chosen one among them."""
    names = ["tuned", *(name for family, name in found.best.items() if family != "tuned")]
    if found.chosen and found.chosen not in names:
        names.append(found.chosen)
    return [found.point(name) for name in names]


def _rows(found: Repair) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for point in shown(found):
        side = _reported(point)
        name = f"{point.name} (chosen)" if point.name == found.chosen else point.name
        lost, learned = amount(side.lost, found.units[0]), amount(side.learned, found.units[1])
        back, there = ("0 %", "100 %") if point.family == "tuned" else (share(side.recovered), share(side.holds))
        rows.append((point.family, name, lost, back, learned, there))
    return rows


def _reported(point: Point) -> Sides:
    return point.held or point.control


def sentence(found: Repair) -> str:
    """What came out, in one line."""
    lost, level = amount(found.lost, found.units[0]), f"{100 * found.confidence:g} %"
    if found.chosen is None and len(found.points) == 1:
        return f"Nothing to repair that these items show: lost {lost} {found.units[0]} ({level} interval)."
    if found.chosen is None:
        bounds = [p.control.upper for p in found.points]
        return (
            f"No point is inside {amount_of(found.lose_at_most, found.units[0])} {found.units[0]} by its upper bound "
            f"on the control half; the nearest has {amount_of(min(bounds), found.units[0])}. More items make bounds "
            "narrower; only the base itself loses nothing."
        )
    side = _reported(found.point(found.chosen))
    back = f"{share(side.recovered)} of what was lost is back" if side.recovered else "what is back cannot be told"
    there = f"{share(side.holds)} of what was learned is there" if side.holds else "what is there cannot be told"
    text = f"{found.chosen}: {back}, {there} ({level} intervals, on items by which it was not chosen)."
    if found.chosen == "tuned":
        text = "No move is better than the tuned model as it is."
    if found.inside is not None:
        word = "inside" if found.inside else "not shown to be inside"
        text += f" Its upper bound there is {amount_of(side.upper, found.units[0])}: {word} the budget."
    return text


def amount_of(value: float | None, unit: str) -> str:
    """A number in its unit."""
    return "–" if value is None else f"{100 * value:.1f}" if unit == "points" else f"{value:.3f}"


def rule(found: Repair) -> str:
    """How the point was chosen."""
    if found.lose_at_most is not None:
        limit = amount_of(found.lose_at_most, found.units[0])
        return (
            f"Chosen on the control half: of the points whose upper bound of the loss is at most {limit} "
            f"{found.units[0]} that which learned most."
        )
    return (
        f"Chosen on the control half: of the points that hold at least {HELD:.0%} of what was learned and have "
        f"at least {NOTABLE:.0%} of what was lost back, that with most back; without such a point, the largest sum of "
        "both shares."
    )


def moves_table(found: Repair) -> str:
    """The table in Markdown, on the held half, with what the tuned model lost and learned on all items."""
    items = f"{found.items['control']} items to choose on, {found.items['held']} to report on"
    first = (
        f"The tuned model lost {amount(found.lost, found.units[0])} {found.units[0]} and learned "
        f"{amount(found.learned, found.units[1])} {found.units[1]} ({items}). {sentence(found)}"
    )
    return f"{first}\n\n{markdown.table(HEAD, _rows(found))}"


def table(found: Repair) -> Table:
    """The same for the terminal."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for word in HEAD[1:]:
        made.add_column(word, overflow="fold")
    for row in _rows(found):
        style = "bold green" if row[1].endswith("(chosen)") else ""
        made.add_row(*(Text(cell, style) for cell in row[1:]))
    return made


def picture(found: Repair) -> Picture | None:
    """Learned against kept on the held half; None where they are not points."""
    if found.units != ("points", "points") or not found.base_score:
        return None
    spots = []
    for point in shown(found):
        side = _reported(point)
        learned = Estimate(**{end: 100 * value for end, value in side.learned.model_dump().items()})
        ends = [100 * (1 - lost / found.base_score) for lost in (side.lost.value, side.lost.high, side.lost.low)]
        spots.append((point.name, learned, Estimate(**dict(zip(("value", "low", "high"), ends)))))
    return front.learned_kept(spots, "points", found.confidence)


def write(found: Repair, work: Repairing) -> Path:
    """Write `repair.md` and `repair.svg`, and with several points `compare.html`; the path of what to open first."""
    folder, drawn = work.folder, picture(found)
    parts = [f"# Repair of {markdown.cell(found.tuned)}", f"Base: {markdown.cell(found.base)}.", moves_table(found)]
    if drawn is not None:
        write_text(folder / "repair.svg", drawn.svg.replace(INK, "#767676"))
        parts += ["![Learned against kept](repair.svg)"]
    parts += [rule(found), *found.notes]
    if found.form:
        parts.append(f"Written: {found.form}, {markdown.cell(found.folder)}.")
    write_text(folder / "repair.md", "\n\n".join(parts) + "\n")
    points = [point.name for point in shown(found) if point.held is not None]
    if len(points) < 2:
        return folder / "repair.md"
    return compare.write(compare.load([_as_run(found, work, name) for name in points]), folder)


def _as_run(found: Repair, work: Repairing, name: str) -> Path:
    """A directory like that of a run for a point on the held half, as comparisons read it."""
    place, stages = work.folder / "points" / name, ["00-base", f"01-{name}"]
    for stage, who in zip(stages, ("base", name)):
        save_items(load_items(work.folder / "answers" / f"{who}-held.parquet"), place / "probes" / f"{stage}.parquet")
    infos = [
        info.model_copy(update={"items": len(part.items), "task": "learned" if info.role == "task" else None})
        for info, part in zip([*work.asked.kept, *work.asked.learned], work.halves["held"])
    ]
    tables: dict[str, list[dict[str, Any]]] = {s: load_items(place / "probes" / f"{s}.parquet") for s in stages}
    thresholds = Thresholds()
    results = Results(
        name=name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=found.base,
        seed=work.settings.seed,
        confidence=found.confidence,
        command="retain repair",
        old="nothing was trained here",
        methods={} if name == "tuned" else {found.point(name).family: dict(found.point(name).settings)},
        tasks=["learned"],
        stages=stages,
        probes=infos,
        matrix=[],
        sequence=Sequence(**dict.fromkeys(Sequence.model_fields)),
        training=[],
        thresholds=thresholds,
        **numbers(tables, infos, found.confidence, thresholds),
    )
    save_results(results, place)
    return place
