"""The page docs/two_tasks.md: what was measured, how, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import small_world
from example_recipes import names_of, without
from matched import REACHED, Point, Verdict, judge, plain_front

USUAL = "rate × 1, 100% of the steps"  # of plain training: what methods must learn about as much as
_HEAD = ("method", "together with", "setting", "old rows", "learned", "lost", "lost A", "lost B",
         "difference to plain", "verdict", "s")  # fmt: skip

_TEXT = """# Every method on one small world

Written by `python bench/two_tasks.py --seeds {seeds}`.

A model of two layers knows A: two facts for each of 24 countries, and how to copy and reverse three letters. Then it
learns B (two more facts for each of the same countries), then C (two more again). All questions look alike and all
answers are of one kind, so what is learned for B and C overwrites A, and C overwrites B: a hard case, in which plain
training loses nearly everything. It shows what a method can do at all, not what it does for a large model that
learns a neighbouring task. B and C are facts to be remembered, of which the model is sure that they are otherwise:
methods that give little weight to such tokens (`eaft`, `stm`, `flow`, `dft`) are out of their depth by design.

- **learned**: right answers to B after B and to C after C, per cent, mean of both. Facts can only be
  remembered, so they are tested as they were taught.
- **lost**: right answers to A before everything − after C, and to B after B − after C, in points, mean of both. Both
  count, because some methods protect what was there before, and others only what the run itself has learned
  (adapters, masks and path integrals that are taken during a task): those can save B alone. `lost A` and `lost B`
  show which.
- **setting**: recipe of the method's example (`examples/NAME.yaml`); its main knob is moved from there, stronger while
  the method learns at least 97 % of what plain training learns, and weaker until it does, on two pilot seeds that
  are not in the table. The setting that lost least on them is measured on the seeds of the table. Methods without a
  knob are tried with smaller learning rates.
- **old rows**: whether the method asked for old rows. It got {old} questions of A with their answers.
- **difference to plain**: lost − what plain training loses *where it learns as much*, paired over seeds and items.
  Plain training is swept over learning rates and early stopping ({settings} settings, below); between two of its
  best settings stands their mixture.
- **verdict**: *does not reach the new score* where less than {reached:.0%} of what plain training learns at the usual
  rate is learned (and that it forgets less even so, where that is certain); otherwise from the difference's
  interval. Of forty verdicts at 95 % about two are wrong by chance.

Brackets are 95 % intervals over seeds and items: what to expect of the next seed in *this* world. s: seconds for both
tasks together, on one core.

{table}
{notes}
## Plain training

Full fine-tuning; what is not beaten on both numbers by another setting is marked and makes up the front that methods
are compared with.

{naive}
"""


@dataclass(frozen=True)
class Row:
    """A method at one setting."""

    name: str
    recipe: list[Any]
    knob: str
    point: Point
    asked: bool
    seconds: float


def verdict(row: Row, plain: Sequence[Row]) -> Verdict:
    """The method against plain training."""
    usual = next(p.point.learned for p in plain if p.knob == USUAL)
    return judge(row.point, [p.point for p in plain], usual)


def line(row: Row, plain: Sequence[Row]) -> str:
    """One line for the terminal."""
    found = verdict(row, plain)
    return f"{row.name} ({row.knob}): learned {_percent(found.learned)}, lost {_percent(found.lost)}: {found.word}"


def page(
    plain: Sequence[Row],
    rows: Sequence[Row],
    failed: Mapping[str, str],
    missing: Sequence[str],
    seeds: Sequence[int],
    old: int,
) -> str:
    """The text of the page; methods that forget least come first, those that learn too little last."""
    found = [(row, verdict(row, plain)) for row in rows]
    found.sort(key=lambda pair: (pair[1].word.startswith("does not"), pair[1].difference.value))
    notes = [f"- `{name}` is not in the table: {problem}." for name, problem in failed.items()]
    if missing:
        notes.append(f"- Not measured yet: {', '.join(missing)}.")
    front = {point.label for point in plain_front([p.point for p in plain])}
    naive = [
        (p.knob, _share(v.learned), _percent(v.lost), "yes" if p.knob in front else "")
        for p in plain
        for v in [verdict(p, plain)]
    ]
    return _TEXT.format(
        seeds=" ".join(map(str, seeds)),
        old=old,
        settings=len(plain),
        reached=REACHED,
        table=table(_HEAD, [_cells(row, v) for row, v in found]),
        notes="\n" + "\n".join(notes) + "\n" if notes else "",
        naive=table(("setting", "learned", "lost", "on the front"), naive),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _cells(row: Row, found: Verdict) -> tuple[str, ...]:
    half = small_world.ITEMS
    lost_a, lost_b = (100 * row.point.lost[:, part].mean() for part in (slice(half), slice(half, None)))
    return (
        f"`{row.name}`",
        ", ".join(names_of(without(row.recipe, row.name))),
        row.knob,
        "yes" if row.asked else "",
        _share(found.learned),
        _percent(found.lost),
        f"{lost_a:.0f}",
        f"{lost_b:.0f}",
        _percent(found.difference),
        f"**{found.word}**" if found.word == "forgets less" else found.word,
        f"{row.seconds:.1f}",
    )


def _percent(interval: Any) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _share(interval: Any) -> str:
    """As `_percent`, without what no share can be: the bootstrap widens beyond the ends."""
    return _percent(interval._replace(low=max(0.0, interval.low), high=min(1.0, interval.high)))
