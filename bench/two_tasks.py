"""All methods on one small world (bench/small_world.py), against plain training of the same new-task score.

    python bench/two_tasks.py                         # every method of the registry; writes docs/two_tasks.md
    python bench/two_tasks.py --only ewc replay       # some of them; the page keeps what was measured before
    python bench/two_tasks.py --seeds 0 1 2           # other seeds
    python bench/two_tasks.py --fresh --only ewc      # measure again
    python bench/two_tasks.py --budget-minutes 9      # stop cleanly; the same command goes on
    python bench/two_tasks.py --workers 8             # so many processes of one thread each

A model that knows A learns B, then C, as in `retain run` with two tasks. Every result is a small file under
bench/out/two_tasks and is not measured twice.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import small_world
import two_tasks_page
from example_recipes import changed, recipe
from matched import Point
from two_tasks_page import Row
from two_tasks_runs import OLD, OutOfTime, Setting, Store, write

from retain import methods

ROOT = Path(__file__).parent.parent
OUT, PAGE = ROOT / "bench" / "out" / "two_tasks", ROOT / "docs" / "two_tasks.md"
PILOTS = (1000, 1001)  # settings are chosen on these seeds, which are not in the table
MARGIN = 0.97  # of plain training's new-task score, asked for on the pilots; 0.95 in the table

#: The knob of a method, weakest value first, where it is not `strength`; a method without any gets learning rates.
LADDERS: dict[str, tuple[str, list[Any]]] = {
    "freeze": ("share", [0.25, 0.5, 0.75]),
    "hft": ("share", [0.25, 0.5, 0.75, 0.9]),
    "ilora": ("decay", [0.9, 0.95, 0.98, 0.99]),
    "interpolate": ("strength", [0.05, 0.1, 0.2, 0.33]),
    "label_smoothing": ("strength", [0.02, 0.1, 0.3]),
    "mofo": ("share", [0.5, 0.15, 0.05, 0.02]),
    "ogd": ("directions", [16, 32, 64, 128, 256]),
    "packnet": ("keep", [0.5, 0.25, 0.1]),
    "replay": ("fraction", [0.05, 0.1, 0.25, 0.5]),
    "sam": ("radius", [0.01, 0.05, 0.2]),
    "shield": ("share", [0.25, 0.5, 0.75, 0.9]),
    "stm": ("threshold", [100.0, 20.0, 5.0, 2.5]),
    "subspace": ("share", [0.25, 0.5, 0.75, 0.9]),
}
#: What the world's 62 tokens need otherwise than the examples.
SMALL: dict[str, dict[str, Any]] = {"der": {"top_k": 16}}
#: Methods that say nothing in this world, and why.
LEFT_OUT = {"sdft": "its teacher is the model with the right answer in its prompt, which two layers cannot make use of"}
_TENS = (-4, -3, -2, -1, 0, 1, 2, 3)
_SLOWER = [1.0, 0.5, 0.25]


def ladder(name: str) -> tuple[list[Setting], int]:
    """Settings of a method, weakest first, and the place of the usual one."""
    own, fields = changed(recipe(name), name, **SMALL.get(name, {})), methods.load(name).Config.model_fields
    usual = next(m for m in methods.build(own) if m.name == name).config
    if name in LADDERS and LADDERS[name][0] in fields:
        knob, values = LADDERS[name]
        now = getattr(usual, knob)
        start = min(range(len(values)), key=lambda i: abs(values[i] - now))
    elif name != "none" and "strength" in fields and not at_most_one(fields["strength"]) and usual.strength:
        knob, values, start = "strength", [float(f"{usual.strength * 10.0**k:.3g}") for k in _TENS], _TENS.index(0)
    else:
        return [{"recipe": own, "rate": rate, "share": 1.0, "knob": f"rate × {rate:g}"} for rate in _SLOWER], 0
    made = [
        {"recipe": changed(own, name, **{knob: v}), "rate": 1.0, "share": 1.0, "knob": f"{knob} {v:g}"} for v in values
    ]
    return made, start


def at_most_one(field: Any) -> bool:
    """Whether a setting cannot be above one."""
    return any(getattr(rule, "le", None) == 1 or getattr(rule, "lt", None) == 1 for rule in field.metadata)


def _plain(rate: float, share: float) -> Setting:
    knob = f"rate × {rate:g}, {share:.0%} of the steps"
    return {"recipe": ["none"], "rate": rate, "share": share, "knob": knob}


#: Plain training, swept over learning rates and where it stops (the schedule ends there, too).
NAIVE = [_plain(rate, share) for rate in (0.3, 0.5, 1.0, 2.0) for share in (0.35, 0.6, 1.0)]
PLAIN = next(setting for setting in NAIVE if setting["knob"] == two_tasks_page.USUAL)


def numbers(results: Sequence[dict[str, Any]], label: str) -> Point:
    """New-task score right after each task, and what A and B lost until the end."""
    new, lost = [], []
    for result in results:
        before, between, after = (
            {f: np.array([int(c) for c in text], dtype=float) for f, text in stage.items()}
            for stage in result["answers"]
        )
        new.append(np.concatenate([between["B"], after["C"]]))
        lost.append(np.concatenate([before["A"] - after["A"], between["B"] - after["B"]]))
    return Point(label, np.stack(new), np.stack(lost))


def choose(rungs: Sequence[Setting], start: int, measure: Callable[[Setting], Point], needed: float) -> Setting:
    """Walk the ladder on the pilot seeds: stronger while enough is learned, weaker until it is; of the settings seen
    that learn enough, the one that lost least; of none, the one that learned most."""
    seen: dict[int, Point] = {}

    def enough(place: int) -> bool:
        seen[place] = measure(rungs[place])
        return seen[place].learned >= needed

    step = 1 if enough(start) else -1
    place = start + step
    while 0 <= place < len(rungs):
        fine = enough(place)
        if fine != (step > 0):
            break
        place += step
    able = [i for i in seen if seen[i].learned >= needed]
    best = min(able, key=lambda i: (seen[i].forgotten, -i)) if able else max(seen, key=lambda i: seen[i].learned)
    return rungs[best]


def measured(name: str, store: Store, seeds: Sequence[int]) -> Row:
    """The row of a method: a setting chosen on the pilot seeds, measured on the others."""

    def pilot(which: str, setting: Setting) -> Point:
        return numbers([store.get(which, setting, seed) for seed in PILOTS], setting["knob"])

    rungs, start = ladder(name)
    best = choose(rungs, start, lambda s: pilot(name, s), MARGIN * pilot("none", PLAIN).learned)
    return row(name, best, store, seeds)


def row(name: str, setting: Setting, store: Store, seeds: Sequence[int]) -> Row:
    """A method at one setting."""
    results = [store.get(name, setting, seed) for seed in seeds]
    seconds = float(np.median([r["seconds"] for r in results]))
    asked = any(r["asked"] for r in results)
    return Row(name, setting["recipe"], setting["knob"], numbers(results, setting["knob"]), asked, seconds)


def _single() -> None:
    """A worker: one thread, and nothing on the screen."""
    import torch
    from datasets import disable_progress_bars

    from retain.cli.common import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    disable_progress_bars()


def _begin(seed: int, folder: Path) -> None:
    small_world.pretrained(seed, folder)


def _plainly(setting: Setting, seed: int, store: Store) -> None:
    with contextlib.suppress(OutOfTime):
        store.get("none", setting, seed)


def _try(name: str, store: Store, seeds: Sequence[int]) -> None:
    with contextlib.suppress(Exception):  # whoever reads the results meets the same error and tells it
        measured(name, store, seeds)


def in_processes(names: Sequence[str], store: Store, seeds: Sequence[int], workers: int) -> None:
    """Measures what is missing, a method to a process; first what every method is compared with."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _single) as pool:
        every = [*PILOTS, *seeds]
        list(pool.map(_begin, every, [store.folder / "base"] * len(every)))
        plain = [(setting, seed) for setting in NAIVE for seed in seeds] + [(PLAIN, seed) for seed in PILOTS]
        list(pool.map(_plainly, *zip(*plain), [store] * len(plain)))
        own = [name for name in names if name != "none" and name not in LEFT_OUT]
        for done in as_completed([pool.submit(_try, name, store, seeds) for name in own]):
            done.result()


def main(arguments: list[str] | None = None) -> int:
    names = methods.names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two or more")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    if len(set(given.seeds)) < 2 or set(PILOTS) & set(given.seeds):
        parser.error(f"--seeds: give two or more different ones; {PILOTS[0]} and {PILOTS[1]} are the pilots.")

    if given.workers > 1 and given.fresh:
        parser.error("--fresh is for one process. Leave one of --fresh and --workers out.")

    from datasets import disable_progress_bars
    from rich.console import Console

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    disable_progress_bars()
    say = Console(stderr=True, highlight=False, markup=False).print
    store = Store(given.out, time.monotonic() + 60 * given.budget_minutes, given.only if given.fresh else ())
    if given.workers > 1:
        in_processes(given.only, store, given.seeds, given.workers)
    kept = Store(given.out, deadline=float("-inf"))  # of methods that were not asked for: what is there
    try:
        plain = [row("none", setting, store, given.seeds) for setting in NAIVE]
    except OutOfTime:
        say("The budget is spent before plain training was measured. The same command goes on.")
        return 3
    rows, missing, failed = [], [], {}
    for name in names:
        if name == "none" or name in LEFT_OUT:
            continue
        try:
            rows.append(measured(name, store if name in given.only else kept, given.seeds))
            say(two_tasks_page.line(rows[-1], plain))
        except OutOfTime:
            missing.append(name)
        except Exception as error:  # a method that cannot be trained here is a line of the table, not its end
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"{name}: {failed[name]}")
    write(given.page, two_tasks_page.page(plain, rows, failed | LEFT_OUT, missing, given.seeds, OLD))
    left = [name for name in missing if name in given.only]
    if left:
        say(f"The budget is spent; missing: {', '.join(left)}. The same command goes on.")
    return 3 if left else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
