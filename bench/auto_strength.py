"""`strength: auto` against a grid of five fixed strengths, on the small world of bench/two_tasks.py.

    python bench/auto_strength.py                        # every method that has it; writes docs/auto_strength.md
    python bench/auto_strength.py --only ewc --seeds 0 1 # some of it; the page keeps what was measured before
    python bench/auto_strength.py --budget-minutes 9     # stop cleanly; the same command goes on

Every result is a small file under bench/out/two_tasks and is not measured twice.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from example_recipes import changed, recipe
from matched import Point, interval, plain_loss
from two_tasks import SMALL, at_most_one, numbers
from two_tasks_runs import OutOfTime, Setting, Store, write

from retain import methods
from retain.functional.statistics import Interval

ROOT = Path(__file__).parent.parent
OUT, PAGE = ROOT / "bench" / "out" / "two_tasks", ROOT / "docs" / "auto_strength.md"
GRID = (0.01, 0.1, 1.0, 10.0, 100.0)  # times the strength of the example
BELOW_ONE = (0.01, 0.1, 1.0, 3.0, 9.0)  # where a strength has an upper end
#: What may be lost, as a share of all that could be: the usual budget, which this world makes impossible, and others.
BUDGETS = (0.02, 0.3, 0.6)

_TEXT = """# A strength that nobody has to choose

Written by `python bench/auto_strength.py --seeds {seeds}`.
The small world of [two_tasks.md](two_tasks.md), in which plain training loses nearly everything. With `strength: auto`
a method begins at its usual strength, and its factor (1/8 to 32) follows the drift from the base, with a budget for
each of the two tasks; what it is on are the questions that the task could overwrite. The grid is the strength of the
method's example times 0.01, 0.1, 1, 10 and 100 (3 and 9 in place of the last two where it must be below 1). By its
factor alone a method often ends above its budget (*lost*); that is what the last step is for, which is left out here so
that strengths are compared with strengths.

- **learned**, **lost**: as there, in points.
- **grid, same loss**: what the best settings of the grid learn *where they lose as much*, chosen with hindsight on
  these very seeds (between two of its best, their mixture), and the difference, paired over seeds and items.
- **grid, same learned**: the other way round: lost by auto − lost by the best of the grid where it learns as much.
- **verdict**: *worse* where auto both learns less at the same loss and loses more at the same learned, beyond the
  intervals; *better* likewise; *as good* otherwise.
- Brackets are 95 % intervals over seeds and items.

{summary}

{table}

## The grid

{grid}
"""


def candidates() -> list[str]:
    """Methods whose strength can be found, and which the table of two_tasks has."""
    found = [methods.load(name)() for name in methods.names() if name not in ("sdft",)]
    return [m.name for m in found if m.boosts and "strength" in m.Config.model_fields]


def settings(name: str) -> tuple[list[Setting], list[Setting]]:
    """(the grid, auto with each budget)."""
    own = changed(recipe(name), name, **SMALL.get(name, {}))
    usual = next(m for m in methods.build(own) if m.name == name).config.strength
    common: Setting = {"rate": 1.0, "share": 1.0}
    times = BELOW_ONE if at_most_one(methods.load(name).Config.model_fields["strength"]) else GRID
    values = [float(f"{usual * factor:.3g}") for factor in times]
    grid = [common | {"recipe": changed(own, name, strength=v), "knob": f"strength {v:g}"} for v in values]
    free = {"every": 5, "calibrate": 3, "drift": None}
    auto = [
        common
        | {"recipe": changed(own, name, strength="auto"), "knob": f"auto, at most {100 * b:g}"}
        | {"budget": {"lose_at_most": b, "lose_at_most_nats": 1e3, **free}}
        for b in BUDGETS
    ]
    return grid, auto


def turned(point: Point) -> Point:
    """Both numbers in each other's place, so that a front is read at equal loss."""
    return Point(point.label, -point.lost, -point.new)


def compared(auto: Point, grid: Sequence[Point]) -> tuple[Interval, Interval, str]:
    """(learned − the grid's at the same loss, lost − the grid's at the same learned, verdict)."""
    more = interval(auto.new + plain_loss([turned(p) for p in grid], turned(auto).learned))
    less = interval(auto.lost - plain_loss(grid, auto.learned))
    word = "as good"
    if more.high < 0 and less.low > 0:
        word = "**worse**"
    elif more.low > 0 and less.high < 0:
        word = "better"
    return more, less, word


def page(measured: dict[str, tuple[list[Point], list[Point]]], seeds: Sequence[int]) -> str:
    """The text of docs/auto_strength.md: method → (grid, auto)."""
    head = ("method", "budget", "learned", "lost", "learned − grid, same loss", "lost − grid, same learned", "verdict")
    words, against, aside = [], 0, 0
    rows, grid_rows = [head, ("---",) * len(head)], [("method", "setting", "learned", "lost"), ("---",) * 4]
    for name, (grid, auto) in measured.items():
        for point in auto:
            more, less, word = compared(point, grid)
            words.append(word.strip("*"))
            against += (more.high < 0) != (less.low > 0)
            aside += (more.low > 0) != (less.high < 0)
            numbers = (interval(point.new), interval(point.lost), more, less)
            rows.append((f"`{name}`", point.label.rpartition(" ")[2], *map(points, numbers), word))
        for point in grid:
            grid_rows.append((f"`{name}`", point.label, points(interval(point.new)), points(interval(point.lost))))
    summary = (
        f"**Worse in {words.count('worse')} of {len(words)}**, better in {words.count('better')}. One of both numbers "
        f"alone speaks against auto in {against}, and for it in {aside}."
    )
    found = {"table": _markdown(rows), "grid": _markdown(grid_rows), "summary": summary}
    return _TEXT.format(seeds=" ".join(map(str, seeds)), **found)


def points(found: Interval) -> str:
    """As points with their interval."""
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def measure(store: Store, name: str, setting: Setting, seeds: Sequence[int]) -> Point:
    """The numbers of a setting over the seeds."""
    results: list[dict[str, Any]] = [store.get(name, setting, seed) for seed in seeds]
    return numbers(results, setting["knob"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=candidates(), metavar="METHOD", help=", ".join(candidates()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)

    import torch

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)  # the model is too small for more
    store = Store(given.out, time.monotonic() + 60 * given.budget_minutes)
    known = Store(given.out, deadline=float("-inf"))  # what was measured before
    measured: dict[str, tuple[list[Point], list[Point]]] = {}
    for name in candidates():
        chosen = store if given.only is None or name in given.only else known
        grid, auto = settings(name)
        try:
            measured[name] = tuple([measure(chosen, name, s, given.seeds) for s in part] for part in (grid, auto))  # type: ignore[assignment]
            print(f"{name}: done")
        except OutOfTime:
            print(f"{name}: not measured")
    if measured:
        write(given.page, page(measured, given.seeds))
        print(given.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
