"""Other numbers of a whole probe than its score: F1, BLEU and others of written answers, and those of every class.

They are those of `results.json` (`totals`, by stage and probe), at the first and the last stage of a run and at the
last one of the runs beside it; at the only stage of a model that was only measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from retain.report import wording
from retain.report.language import say
from retain.results import ClassNumbers, Results, Totals

#: In the order in which they are shown; what a probe has of them is the score itself, or stands here.
NUMBERS = (
    *("macro_f1", "micro_f1", "corpus_bleu", "bleu", "rouge_l"),
    *("exact_match", "contains", "keywords", "similarity"),
)
OF_CLASS = ("precision", "recall", "f1")


class OfClass(NamedTuple):
    """One class of a classification probe: how many items belong to it, and "before → after" for each number."""

    probe: str
    name: str
    items: int
    cells: list[str]


class Shown(NamedTuple):
    """Both tables: `numbers` under `heads`, `classes` under `words`."""

    heads: list[str]
    numbers: list[tuple[str, str, list[str]]]
    words: list[str]
    classes: list[OfClass]


def shown(results: Results, beside: Sequence[tuple[str, Results]] = ()) -> Shown:
    """The tables of a run.

    Args:
        beside: (label, results) of the runs to set beside it.
    """
    words = [say(f"totals.{key}") for key in OF_CLASS]
    return Shown(heads(results, beside), numbers(results, beside), words, classes(results))


def heads(results: Results, beside: Sequence[tuple[str, Results]] = ()) -> list[str]:
    """What the columns of `numbers` say."""
    mine = ["probes.before", "probes.after"] if results.changes else ["probes.score"]
    return [*map(say, mine), *(say("totals.after_other", name=label) for label, _ in beside)]


def numbers(results: Results, beside: Sequence[tuple[str, Results]] = ()) -> list[tuple[str, str, list[str]]]:
    """(probe, number, a cell for each of `heads`), for every probe that has such numbers."""
    columns = [*_stages(results), *(_stages(theirs)[-1] for _, theirs in beside if theirs.stages)]
    rows = []
    for info in results.probes:
        there = [column[info.name].numbers if info.name in column else {} for column in columns]
        for name in NUMBERS:
            if any(name in found for found in there):
                rows.append((info.name, say(f"totals.{name}"), [_percent(found.get(name)) for found in there]))
    return rows


def classes(results: Results) -> list[OfClass]:
    """Precision, recall and F1 of every class, before and after."""
    columns = _stages(results)
    found = []
    for info in results.probes:
        there = [column[info.name].classes if info.name in column else {} for column in columns]
        for name, last in (there[-1] if there else {}).items():
            cells = [" → ".join(_number(one.get(name), key) for one in there) for key in OF_CLASS]
            found.append(OfClass(info.name, name, last.items, cells))
    return found


def _stages(results: Results) -> list[Mapping[str, Totals]]:
    """The numbers by probe at the first and at the last stage; once where nothing was trained."""
    if not results.stages:
        return []
    stages = [results.stages[0], results.stages[-1]] if results.changes else results.stages[:1]
    return [results.totals.get(stage, {}) for stage in stages]


def _number(found: ClassNumbers | None, key: str) -> str:
    return _percent(None if found is None else getattr(found, key))


def _percent(share: float | None) -> str:
    return "–" if share is None else wording.percent(wording.number(100 * share))
