"""Does a short pilot order recipes as the full run does? On the small world (bench/small_world.py): runs are short.

    python bench/pilot.py                         # all recipes and seeds; writes its table into docs/advise.md
    python bench/pilot.py --seeds 0 1 2           # other seeds
    python bench/pilot.py --budget-minutes 9      # stop cleanly; the same command goes on

A model that knows A learns B, then C, with every recipe: the whole way, and as pilots of a part of the steps, of which
fewer items are asked. The balance of what was kept and what was learned (weights as in `verdict`) orders the recipes.
Every run leaves a small file under bench/out/pilot and is not run twice; what came out is bench/results/pilot.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from two_tasks import numbers
from two_tasks_page import table
from two_tasks_runs import OutOfTime, Store, write

ROOT = Path(__file__).parent.parent
OUT, RESULTS, PAGE = ROOT / "bench" / "out" / "pilot", ROOT / "bench" / "results" / "pilot.json", ROOT / "docs"
BEGIN, END = "<!-- bench/pilot.py writes from here -->", "<!-- to here -->"
#: What is compared: recipes as advice would name them, and plain training.
RECIPES: dict[str, list[Any]] = {
    "plain": ["none"],
    "lora": [{"lora": {"r": 16}}],
    "freeze half": [{"freeze": {"share": 0.5}}],
    "interpolate 0.33": [{"interpolate": {"strength": 0.33}}],
    "ewc": [{"ewc": {"strength": 1.0}}],
    "ewc + distill": [{"ewc": {"strength": 1.0}}, {"distill": {"strength": 0.5}}],
    "replay 0.1": [{"replay": {"fraction": 0.1}}],
    "replay 0.3": [{"replay": {"fraction": 0.3}}],
    "ewc + replay": [{"ewc": {"strength": 1.0}}, {"replay": {"fraction": 0.2}}],
    "replay + distill": [{"replay": {"fraction": 0.3}}, {"distill": {"strength": 2.0}}],
    "lora + replay + distill": [
        {"lora": {"r": 16}},
        {"replay": {"fraction": 0.3}},
        {"distill": {"strength": 2.0}},
        {"interpolate": {"strength": 0.1}},
    ],
}
#: Pilots: share of the steps, and items asked of the 48 of every family.
PILOTS = ((0.25, 12), (0.25, 24), (0.25, 48))
KEEP, LEARN = 0.6, 0.4  # `verdict.keep_weight` and `verdict.learn_weight`


def setting(name: str, share: float) -> dict[str, Any]:
    """A recipe as bench/two_tasks_runs.py wants it."""
    return {"recipe": RECIPES[name], "rate": 1.0, "share": share, "knob": f"{share:.0%} of the steps"}


def balance(result: dict[str, Any], items: int) -> float:
    """Balance of one run, 0 to 1, by the first `items` of every family."""
    cut = result | {"answers": [{f: text[:items] for f, text in stage.items()} for stage in result["answers"]]}
    point = numbers([cut], "")
    return KEEP * (1 - point.forgotten) + LEARN * point.learned


def agreement(pilot: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """How well pilots tell the order of the full runs.

    Args:
        pilot, full: (seeds, recipes) balances.

    Returns:
        Spearman's and Kendall's rank correlation of every seed's pilot with the full run of the same seed, each as mean
        with the ends of its 95 % interval over seeds (Student's t); "lost": full balance of the best recipe − that of
        the recipe that the pilot put first, in points, mean with interval; "first": how often these two are one.
    """
    pairs = list(zip(pilot, full))
    gap = [100 * float(whole.max() - whole[int(short.argmax())]) for short, whole in pairs]
    return {
        "spearman": _mean([float(stats.spearmanr(short, whole).statistic) for short, whole in pairs]),
        "kendall": _mean([float(stats.kendalltau(short, whole).statistic) for short, whole in pairs]),
        "lost": _mean(gap),
        "first": f"{sum(g == 0 for g in gap)} of {len(gap)}",
    }


def _mean(values: Sequence[float]) -> list[float]:
    mean, half = float(np.mean(values)), 0.0
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return [round(number, 4) for number in (mean, mean - half, mean + half)]


def measured(store: Store, seeds: Sequence[int], say: Any) -> dict[str, Any]:
    """All runs, and what they say.

    Raises:
        OutOfTime: the budget is spent.
    """
    found: dict[float, list[list[dict[str, Any]]]] = {}
    for share in (1.0, *dict.fromkeys(share for share, _ in PILOTS)):
        found[share] = []
        for seed in seeds:
            found[share].append([store.get(name.replace(" ", "-"), setting(name, share), seed) for name in RECIPES])
            say(f"seed {seed}, {share:.0%} of the steps: done")

    def balances(share: float, items: int) -> np.ndarray:
        return np.array([[balance(result, items) for result in row] for row in found[share]])

    full = balances(1.0, 48)
    # what a pilot can reach at most: the full run of another seed, which differs by chance alone
    others = np.roll(full, 1, axis=0)
    seconds = {share: float(np.mean([r["seconds"] for row in rows for r in row])) for share, rows in found.items()}
    points = [numbers([row[i] for row in found[1.0]], name) for i, name in enumerate(RECIPES)]
    return {
        "seeds": list(seeds),
        "recipes": {
            point.label: {"learned": point.learned, "lost": point.forgotten, "balance": float(full[:, i].mean())}
            for i, point in enumerate(points)
        },
        "pilots": [
            {"steps": share, "items": items, "cost": seconds[share] / seconds[1.0]}
            | agreement(balances(share, items), full)
            for share, items in PILOTS
        ],
        "another seed": {"steps": 1.0, "items": 48, "cost": 1.0} | agreement(others, full),
    }


def text(found: dict[str, Any]) -> str:
    """The tables, as Markdown."""

    def shown(numbers: Sequence[float], digits: int = 2, largest: float = 1.0) -> str:
        mean, low, high = (f"{max(-largest, min(largest, number)):.{digits}f}" for number in numbers)
        return f"{mean} [{low}, {high}]" if len(found["seeds"]) > 2 else mean  # two say nothing about a third

    rows = [
        (f"{p['steps']:.0%}", f"{p['items']}", f"{p['cost']:.0%}", shown(p["spearman"]), shown(p["kendall"]),
         p["first"], shown(p["lost"], 1, 100))
        for p in found["pilots"]
    ]  # fmt: skip
    other = found["another seed"]
    rows.append(("all, another seed", "48", "100%", shown(other["spearman"]), shown(other["kendall"]), other["first"],
                 shown(other["lost"], 1, 100)))  # fmt: skip
    head = ("steps of the pilot", "items of each family", "time", "Spearman", "Kendall", "same winner",
            "points of balance lost")  # fmt: skip
    best = sorted(found["recipes"].items(), key=lambda pair: -pair[1]["balance"])
    recipes = [(n, *(f"{100 * r[key]:.0f}" for key in ("learned", "lost", "balance"))) for n, r in best]
    seeds = " ".join(map(str, found["seeds"]))
    return "\n\n".join(
        [
            f"Written by `python bench/pilot.py --seeds {seeds}`: {len(recipes)} recipes, {len(found['seeds'])} seeds.",
            table(head, rows),
            "The full runs, means over the seeds, in per cent:",
            table(("recipe", "learned", "lost", "balance"), recipes),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two or more")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE / "advise.md")
    given = parser.parse_args(arguments)
    if len(set(given.seeds)) < 2:
        parser.error("--seeds: give two or more different ones.")

    from datasets import disable_progress_bars
    from rich.console import Console

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    disable_progress_bars()
    say = Console(stderr=True, highlight=False, markup=False).print
    store = Store(given.out, time.monotonic() + 60 * given.budget_minutes)
    try:
        found = measured(store, given.seeds, say)
    except OutOfTime:
        say("The budget is spent. The same command goes on.")
        return 3
    write(given.results, json.dumps(found, indent=1) + "\n")
    page = given.page.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        parser.error(f"{given.page}: the lines {BEGIN} and {END} are missing.")
    write(given.page, f"{before}{BEGIN}\n\n{text(found)}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
