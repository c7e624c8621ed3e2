"""What methods keep and learn on the starter model and real rows: table, front and verdicts over seeds.

    python bench/retention.py --data DATA --plan                # what is left to run, and for how long
    python bench/retention.py --data DATA --budget-minutes 90   # some of it; stops between two runs
    python bench/retention.py --data DATA --only naive replay --seeds 0 1 2
    python bench/retention.py                                             # the page from the results that are there

DATA is a folder with data sets (reasoning_gym to learn; arc_easy, piqa, blimp and facts_* to keep; dolly to
replay), each with train.jsonl or test.jsonl. Every run leaves a file of scores under bench/results/retention; it is
not run again while that is there. Writes docs/retention.md and docs/retention.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matched import REACHED, Point, Verdict, interval, judge
from retention_runs import EPOCHS, FAMILIES, KEPT, Bench, Recipe, carry_out, recipes, write

from retain.functional.statistics import Interval, macro_interval
from retain.report import front
from retain.report.canvas import INK
from retain.results import Estimate

ROOT = Path(__file__).parent.parent
RESULTS, WORK = ROOT / "bench" / "results" / "retention", ROOT / "bench" / "out" / "retention"
SECONDS = {False: 230.0, True: 90.0}  # of a run, and of an interpolation, until some were measured here

NOTHING = "no new score to compare at"

_TEXT = """# Learned against kept, on a real model

Written by `python bench/retention.py --data DATA --seeds {seeds} --items {items} --task-items {asked}`.
SmolLM2-135M-Instruct learns {count} families of `reasoning_gym` ({families}): all their training rows, {epochs}
epochs, batch 8. They are those that plain training learns, found on training rows alone (`python bench/learnable.py`).
Learned is measured on {asked} new rows, of which only the exact answer counts; kept: the core suite, {kept}; at most
{items} items a probe.
Measured on {machine}.

![Learned against kept](retention.svg)

{table}

- **learned**: gain on unseen rows of the same families, in points. **lost**: what the reference probes lost, in points,
  mean over probes; **kept**: the same as a percentage of the base.
- **less than without it**: lost by `naive`, or by `lora` where an adapter moves, − lost, paired over items and seeds:
  what the methods save at the same number of new rows, whatever they learn.
- **difference to plain**: lost − what plain training loses where it learns as much, paired over items and seeds. Plain
  training is all `naive` rows: three learning rates, stopped halfway, and weights between the base and the end
  (`alpha`); between two of its best settings stands their mixture.
- **verdict**: *does not reach the new score* where less than {reached:.0%} of the largest gain of plain training is
  learned (and that it forgets less even so, where that is certain and some plain training learned as little), else
  from that interval. No verdict without two seeds, and none where no plain run learned anything that its
  interval tells from 0: there is no new score then at which to compare, and neither is there a difference to plain.
- Brackets are 95 % intervals over seeds and items, over items alone where there is one seed. The settings of the
  methods are usual ones, not tuned on these data. `dolly-5` replays 5 % rows of dolly-15k; all other replay is
  self-written.{missing}

Recipes:

{recipes}
"""


@dataclass(frozen=True)
class Row:
    """A recipe with what was measured so far."""

    recipe: Recipe
    seeds: list[int]
    point: Point
    kept_of: float  # mean score of the base on what is to be kept
    found: Verdict | None
    saved: Interval | None = None  # lost by the plain training of the same weights − lost

    def percent_kept(self) -> Estimate:
        lost = self.lost
        value, low, high = (100 * (1 - x / self.kept_of) for x in (lost.value, lost.high, lost.low))
        return Estimate(value=value, low=low, high=high)

    @property
    def lost(self) -> Interval:
        return self.found.lost if self.found else macro_interval([self.point.lost.mean(0)])

    @property
    def learned(self) -> Interval:
        return self.found.learned if self.found else macro_interval([self.point.new.mean(0)])


def measured(results: Path, recipe: str, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Seed → scores by probe, of the runs that are done."""
    paths = {seed: results / f"{recipe}-seed{seed}.json" for seed in seeds}
    return {seed: json.loads(path.read_text())["scores"] for seed, path in paths.items() if path.is_file()}


def changes(base: dict[str, Any], runs: Sequence[dict[str, Any]], role: str) -> np.ndarray:
    """(runs, items): after − before; items of short probes count more, so that the mean is the mean over probes."""
    probes = [name for name, about in base["probes"].items() if about["role"] == role and about["share"]]
    total = sum(len(base["scores"][name]) for name in probes)
    parts = []
    for name in probes:
        before = _array(base["scores"][name])
        sign = 1.0 if base["probes"][name]["up"] else -1.0
        weight = sign * total / (len(probes) * len(before))
        parts.append(weight * np.stack([_array(run[name]) - before for run in runs]))
    return np.concatenate(parts, axis=1)


def _array(scores: Any) -> np.ndarray:
    return np.array([float(score) for score in scores])


def rows(results: Path, seeds: Sequence[int]) -> list[Row]:
    """Every recipe of which a run is done, in the order of `recipes`."""
    base = json.loads((results / "base.json").read_text())
    kept = [name for name, about in base["probes"].items() if about["role"] == "reference" and about["share"]]
    means = [(_array(base["scores"][n]).mean(), base["probes"][n]["up"]) for n in kept]
    kept_of = float(np.mean([mean if up else 1 - mean for mean, up in means]))
    done = {r.name: measured(results, r.name, seeds) for r in recipes()}

    def point(name: str, chosen: Sequence[int]) -> Point:
        runs = [done[name][seed] for seed in chosen]
        return Point(name, changes(base, runs, "task"), -changes(base, runs, "reference"))

    found = []
    for recipe in recipes():
        if not done[recipe.name]:
            continue
        mine = sorted(done[recipe.name])
        plain = [r.name for r in recipes() if r.name.startswith("naive") and done[r.name]]
        common = [seed for seed in mine if all(seed in done[name] for name in plain)]
        verdict = None
        if len(common) > 1 and plain:
            opponents = [point(name, common) for name in plain]
            verdict = judge(point(recipe.name, common), opponents, max(p.learned for p in opponents))
            if all(interval(p.new).low <= 0 for p in opponents):
                verdict = replace(verdict, word=NOTHING)
        used = common if verdict else mine
        other = "lora" if recipe.carrier == "LoRA" else "naive"
        both = [seed for seed in used if seed in done.get(other, {})]
        saved = None
        if len(both) > 1 and not recipe.name.startswith("naive") and recipe.name != other:
            saved = interval(point(other, both).lost - point(recipe.name, both).lost)
        found.append(Row(recipe, used, point(recipe.name, used), kept_of, verdict, saved))
    return found


def page(found: Sequence[Row], seeds: Sequence[int], base: dict[str, Any]) -> str:
    """The text of docs/retention.md; `base` is what base.json holds."""
    sizes = {role: [len(base["scores"][n]) for n, p in base["probes"].items() if p["role"] == role]
             for role in ("task", "reference")}  # fmt: skip
    head = ("recipe", "carrier", "seeds", "learned", "lost", "kept", "less than without it", "difference to plain",
            "verdict")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for row in found:
        plain = row.recipe.name.startswith("naive")
        kept = row.percent_kept()
        word = "" if plain else row.found.word if row.found else "needs two seeds"
        lines.append(
            (
                *(f"`{row.recipe.name}`", row.recipe.carrier, str(len(row.seeds))),
                *(_points(row.learned), _points(row.lost)),
                f"{kept.value:.0f} % [{kept.low:.0f}, {kept.high:.0f}]",
                _points(row.saved) if row.saved else "",
                _points(row.found.difference) if row.found and not plain and row.found.word != NOTHING else "",
                word,
            )
        )
    missing = [f"`{r.name}`" for r in recipes() if r.name not in {row.recipe.name for row in found}]
    used = [f"- `{r.recipe.name}`: `{json.dumps(r.recipe.methods)}`, {_training(r.recipe)}" for r in found]
    return _TEXT.format(
        seeds=" ".join(map(str, seeds)),
        count=len(FAMILIES),
        families=", ".join(f"`{name}`" for name in FAMILIES),
        epochs=EPOCHS,
        kept=", ".join(f"`{name}`" for name in KEPT),
        table="\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        reached=REACHED,
        items=max(sizes["reference"]),
        asked=sum(sizes["task"]),
        machine=base["machine"],
        recipes="\n".join(used),
        missing=f" Not measured yet: {', '.join(missing)}." if missing else "",
    )


def _points(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _training(recipe: Recipe) -> str:
    if recipe.alpha is not None:
        return f"{recipe.alpha:g} of the way from the base to `{recipe.after}`"
    from retention_runs import ADAPTER, FULL

    train = {"learning_rate": ADAPTER if recipe.carrier == "LoRA" else FULL} | recipe.train
    return ", ".join(f"{key} {value:g}" for key, value in train.items())


def picture(found: Sequence[Row]) -> str:
    """Learned against kept, as SVG."""
    points = []
    for row in found:
        learned = Estimate(**{end: 100 * getattr(row.learned, end) for end in ("value", "low", "high")})
        points.append((row.recipe.name, learned, row.percent_kept()))
    return front.learned_kept(points, "points").svg.replace(INK, "#767676")


def left(bench: Bench, seeds: Sequence[int], only: list[str] | None) -> tuple[int, float]:
    """(runs that are not done, hours they will take): by the runs that are done, or by what one is known to take."""
    took: dict[bool, list[float]] = {False: [], True: []}
    for path in bench.results.glob("*-seed*.json"):
        result = json.loads(path.read_text())
        took[result["alpha"] is not None].append(result["seconds"])
    each = {kind: statistics.median(seen) if seen else SECONDS[kind] for kind, seen in took.items()}
    jobs = list(bench.jobs(list(seeds), only))
    return len(jobs), sum(each[recipe.alpha is not None] for recipe, _ in jobs) / 3600


def main(arguments: list[str] | None = None) -> int:
    names = [r.name for r in recipes()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets; without it nothing is run")
    parser.add_argument("--only", nargs="+", choices=names, metavar="RECIPE", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plan", action="store_true", help="print what is left to run, and stop")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no run that would pass it")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--items", type=int, default=16, help="per probe")
    parser.add_argument("--task-items", type=int, default=64, help="new questions of the families that are learned")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "retention.md")
    parser.add_argument("--train", type=json.loads, default={}, help="training settings over the bench's, as JSON")
    given = parser.parse_args(arguments)

    from rich.console import Console

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    say = Console(stderr=True, highlight=False, markup=False).print
    bench = Bench(given.data, given.work, given.results, given.model, given.items, given.task_items, given.train, say)
    count, hours = left(bench, given.seeds, given.only)
    if given.plan:
        print(f"{count} runs remain, about {hours:.1f} hours.")
        return 0
    begun, longest = time.monotonic(), 0.0
    for recipe, seed in bench.jobs(given.seeds, given.only) if given.data else ():
        start = time.monotonic()
        guess = longest or SECONDS[recipe.alpha is not None]
        if start + guess - begun > 60 * given.budget_minutes:
            count, _ = left(bench, given.seeds, given.only)
            say(f"The budget is spent; {count} runs remain. The same command goes on.")
            break
        if bench.path(recipe.name, seed).is_file():
            continue  # came with another one
        say(f"\n{recipe.name}, seed {seed}")
        carry_out(bench, recipe, seed)
        if recipe.alpha is None:
            longest = max(longest, time.monotonic() - start)
    found = rows(given.results, given.seeds) if (given.results / "base.json").is_file() else []
    if not found:
        say("No results yet. Give --data.")
        return 1
    write(given.page, page(found, given.seeds, json.loads((given.results / "base.json").read_text())))
    write(given.page.with_suffix(".svg"), picture(found))
    print(f"{given.page}: {len(found)} recipes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
