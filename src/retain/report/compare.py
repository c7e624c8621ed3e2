"""Runs on the same base, tasks and probes, side by side: `compare.html`, `compare.md` and `compare.svg`.

The first run is the reference. What the others learned and lost is set against it item by item, on the same items.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from retain import analysis
from retain.errors import RunError
from retain.report import front, markdown, page, wording
from retain.report.canvas import INK, Picture, short
from retain.report.language import say
from retain.report.wording import BigNumber, Tone
from retain.results import Estimate, ProbeInfo, Results, load_items, load_results, write_text


@dataclass(frozen=True)
class Standing:
    """A run among those that it is compared with.

    `learned` is its mean gain on the task probes (a share, or nats per token where `unit` says so), `kept` what
    `wording.kept_share` says; None where that was not measured. `numbers` says it in words, also against the first run.
    """

    label: str
    directory: Path
    results: Results
    numbers: list[BigNumber]
    learned: Estimate | None
    kept: Estimate | None
    unit: str


def load(runs: Sequence[Path]) -> list[Standing]:
    """The runs as they stand, in their order.

    Args:
        runs: directories of two or more finished runs; the first is the reference.

    Raises:
        RunError: a run is not finished or damaged, or has another base, other tasks or other probes than the first.
    """
    place = Path(runs[0])
    first = load_results(place)
    wording.check_finished(first)
    named = [(first.name, place, first), *page.others(place, first, runs[1:])]
    base, reference = _items(place, first, 0), _items(place, first, -1)
    found = []
    for label, directory, results in named:
        _check_same(first, results)
        if _asked(_items(directory, results, 0)) != _asked(base):
            raise RunError(
                f"compare: '{results.name}' was asked other questions than '{first.name}'. Compare runs with the same "
                "test rows, probes and seed."
            )
        last = _items(directory, results, -1)
        percent = wording.confidence(results) + say("list.colon")  # said once, below the table
        numbers = [dataclasses.replace(n, interval=n.interval.removeprefix(percent)) for n in wording.three(results)]
        learned = None
        against: list[BigNumber] = []
        unit = "points"
        for role, word in (("task", "compare.learned_against"), ("reference", "compare.lost_against")):
            infos = _probes(first, role)
            if not infos:
                continue
            paired = analysis.compare_runs(base, reference, last, infos, confidence=first.confidence)
            nats = paired.unit != "score"
            more = paired.saved if role == "task" else _minus(paired.saved)
            against.append(_against(say(word, name=short(first.name)), more, paired.saved, nats))
            if role == "task":
                learned, unit = _minus(paired.lost_b), "nats per token" if nats else "points"
                if len(infos) > 1:
                    numbers[0] = dataclasses.replace(numbers[0], interval=_interval(learned, nats))
        if directory == place:
            word = say("compare.reference")
            against = [dataclasses.replace(n, value=word, interval="", tone="unknown") for n in against]
        kept = wording.kept_share(results)
        found.append(Standing(label, directory, results, [*numbers, *against], learned, kept, unit))
    return found


def write(standings: Sequence[Standing], folder: Path) -> Path:
    """Write the three files; returns the path of `compare.html`.

    Raises:
        RunError: the folder cannot be written.
    """
    picture = draw(standings)
    texts = {"compare.html": _html(standings, folder, picture), "compare.md": _markdown(standings, picture)}
    if picture is not None:
        texts["compare.svg"] = picture.svg.replace(INK, "#767676")
    try:
        for name, text in texts.items():
            write_text(folder / name, text)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}). Give another folder as --output.") from error
    return folder / "compare.html"


def draw(standings: Sequence[Standing]) -> Picture | None:
    """The picture; None unless every run has both numbers."""
    factor = 1 if standings[0].unit != "points" else 100
    points = []
    for s in standings:
        if s.learned is None or s.kept is None:
            return None
        learned = Estimate(**{end: factor * value for end, value in s.learned.model_dump().items()})
        points.append((s.label, learned, s.kept))
    unit = say("unit.points" if standings[0].unit == "points" else "unit.nats_token")
    return front.learned_kept(points, unit, standings[0].results.confidence)


def methods(results: Results) -> str:
    """Names of the methods of a run."""
    return ", ".join(results.methods) or say("compare.plain")


def _check_same(mine: Results, other: Results) -> None:
    if len(other.stages) < 2:
        raise RunError(f"compare: '{other.name}' was only measured. Compare runs that learned something.")
    if other.tasks != mine.tasks:
        raise RunError(
            f"compare: '{other.name}' learned {', '.join(other.tasks)}; '{mine.name}' {', '.join(mine.tasks)}. "
            "Compare runs of the same tasks in the same order."
        )
    ours, theirs = ({(p.name, p.kind, p.role, p.items) for p in r.probes} for r in (mine, other))
    if ours != theirs:
        names = sorted({name for name, *_ in ours ^ theirs})
        raise RunError(
            f"compare: '{other.name}' and '{mine.name}' have other probes or numbers of items ({', '.join(names[:3])}"
            f"{', …' * (len(names) > 3)}). Run both with the same `probes` setting."
        )
    for probe, before in mine.scores[mine.stages[0]].items():
        start = other.scores[other.stages[0]][probe]
        if start.low > before.high or start.high < before.low:
            raise RunError(
                f"compare: before training '{other.name}' scored {start.value:.3g} on '{probe}', '{mine.name}' "
                f"{before.value:.3g}: another base. Compare runs on the same base model."
            )


def _items(directory: Path, results: Results, place: int) -> list[dict[str, Any]]:
    return load_items(directory / "probes" / f"{results.stages[place]}.parquet") if results.stages else []


def _asked(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    return {(row["probe"], row["item"], row["prompt"]) for row in rows}


def _probes(results: Results, role: str) -> list[ProbeInfo]:
    """Probes whose changes can be averaged: those scored from 0 to 1, or without any, the perplexities."""
    mine = [info for info, _ in wording.changes_of(results, role)]
    return [p for p in mine if wording.is_share(p)] or [p for p in mine if p.is_perplexity]


def _minus(estimate: Estimate) -> Estimate:
    return Estimate(value=-estimate.value, low=-estimate.high, high=-estimate.low)


def _interval(estimate: Estimate, nats: bool) -> str:
    return f"[{_amount(estimate.low, nats)}, {_amount(estimate.high, nats)}]"


def _amount(value: float, nats: bool) -> str:
    return wording.number(value, 3, True) if nats else wording.points(value)


def _against(label: str, shown: Estimate, better: Estimate, nats: bool) -> BigNumber:
    tone: Tone = "good" if better.low > 0 else "bad" if better.high < 0 else "unknown"
    value = f"{_amount(shown.value, nats)} {say('unit.nats' if nats else 'unit.points')}"
    return BigNumber(label, value, _interval(shown, nats), "", tone)


def explained(standings: Sequence[Standing]) -> str:
    """How to read the numbers."""
    first = standings[0]
    return say("compare.explained", percent=wording.confidence(first.results), name=first.label)


def _title(standings: Sequence[Standing]) -> str:
    names = [s.label for s in standings]
    return " · ".join(names) if len(names) < 5 else say("compare.others", first=names[0], n=len(names) - 1)


def _markdown(standings: Sequence[Standing], picture: Picture | None) -> str:
    numbers = [n.label.lower() for n in standings[0].numbers]
    head = [say("side.run"), say("compare.methods"), *numbers, say("side.verdict")]
    rows = [
        [
            s.label,
            methods(s.results),
            *(f"{n.value} {n.interval}".strip() for n in s.numbers),
            wording.headline(s.results)[0],
        ]
        for s in standings
    ]
    first = standings[0].results
    parts = [
        f"# {markdown.cell(_title(standings))}",
        f"{markdown.cell(first.model)} → {markdown.cell(say('page.then').join(first.tasks))}",
        markdown.table([markdown.cell(word) for word in head], rows),
    ]
    if picture is not None:
        parts += [f"![{picture.title}](compare.svg)", picture.alt]
    return "\n\n".join([*parts, explained(standings)]) + "\n"


def _html(standings: Sequence[Standing], folder: Path, picture: Picture | None) -> str:
    return page.template("compare.html.j2").render(
        title=_title(standings),
        first=standings[0].results,
        standings=standings,
        picture=picture,
        side_by_side=page.side_by_side([(s.label, s.results) for s in standings]),
        explained=explained(standings),
        about=_about,
        settings=lambda results: [(name, page.pairs(own)) for name, own in results.methods.items()],
        reports={s.label: _link(s.directory / "report.html", folder) for s in standings},
    )


def _about(results: Results) -> str:
    """Methods, seed and time of a run in a line; of a model that was not trained here, only what was done to it."""
    if not results.training:
        return ", ".join(results.methods)
    time = wording.duration(math.fsum(s.seconds for s in results.training))
    return say("compare.about", methods=methods(results), seed=results.seed, time=time)


def _link(path: Path, folder: Path) -> str | None:
    """Where a file is, seen from the folder; None where it is not there."""
    return quote(Path(os.path.relpath(path, folder)).as_posix()) if path.is_file() else None
