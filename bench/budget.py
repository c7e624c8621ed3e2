"""Whether a forgetting budget is kept on questions that it never saw, and what it costs: runs on the starter model.

    python bench/budget.py --data DATA --seeds 0 1 2 3 4      # goes on where it was stopped; several may run at once
    python bench/budget.py                                    # the page from the results that are there

DATA is a folder with data sets (reasoning_gym to learn, facts_countries to keep, instruct_lfs to replay). Every run
leaves a file under bench/results/budget and is not run again while that is there. Writes docs/budget_study.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from budget_runs import BUDGETS, FACTORS, FAMILIES, HALVES, SHARE, STRENGTH, TASK, Study, carry_out
from matched import Point, interval, plain_loss
from retention_runs import write
from scipy.stats import binom

from retain.functional.statistics import Interval, macro_interval

ROOT = Path(__file__).parent.parent
RESULTS, WORK = ROOT / "bench" / "results" / "budget", ROOT / "bench" / "out" / "budget"
CONFIDENCE = 0.95

_TEXT = """# Is the budget kept?

Written by `python bench/budget.py --data DATA --seeds {seeds}`.
SmolLM2-135M-Instruct learns {families} of `reasoning_gym` with LoRA, 20 steps of 4 rows, at a learning rate of 1e-3,
at which it forgets a lot. What must be kept are {items} questions: capitals, continents, sums. Others of the same kinds
({held} of them, the *held* half) are asked before and after, and are never shown to the budget.

{count} runs with a budget, {confidence:.0%} sure. **Held loss above the budget in {over} of {count}** runs; {surely}
of them surely, by the interval of the held questions. {allowed}

{table}

- **kept to**: of the way to what was learned, that was gone after training; **feasible**: runs in which some of it
  could be kept inside the budget.
- **lost (control)** is what the budget saw, **bound** its upper end; **lost (held)**: on the questions it did not see.
- **learned**: gain on unseen rows, exact answers, in points.
- **fixed, same loss**: what the best fixed settings of the same methods learn where they lose as much on the held
  questions (between two of them, their mixture; where all lose more, the one that loses the least), and the difference,
  paired over seeds and items.
- **fixed, with hindsight**: the fixed setting that learned most of those whose mean held loss is inside the budget.
- Brackets are 95 % intervals over seeds and items.

## Fixed settings

LoRA, `replay` at {share:.0%} and `distill` at {strength:g}, both times a factor that does not move; 0 is LoRA alone. A
budget begins with the factor 1.

{fixed}

## Every run with a budget

{runs}
"""


def load(results: Path, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The runs of a setting that are done, in order of the seeds."""
    paths = [results / f"{name}-seed{seed}.json" for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def parts(run: dict[str, Any], half: str) -> list[np.ndarray]:
    """Before − after of the items of each probe of a half."""
    names = [name for name in run["before"] if name.endswith(f"_{half}")]
    return [_digits(run["before"][n]) - _digits(run["after"][n]) for n in names]


def lost(run: dict[str, Any], half: str) -> np.ndarray:
    """(items,): the same together; items of short probes count more, so that the mean is the mean over probes."""
    return _weighted(parts(run, half))


def learned(run: dict[str, Any]) -> np.ndarray:
    """(items,): after − before."""
    return _digits(run["after"][TASK]) - _digits(run["before"][TASK])


def _weighted(parts: list[np.ndarray]) -> np.ndarray:
    total = sum(map(len, parts))
    return np.concatenate([part * total / (len(parts) * len(part)) for part in parts])


def _digits(text: str) -> np.ndarray:
    return np.array([float(digit) for digit in text])


def same_loss(runs: Sequence[dict[str, Any]], fixed: Sequence[Sequence[dict[str, Any]]]) -> tuple[float, Interval]:
    """(what the front of the fixed settings learns at the held loss of `runs`, learned − that), paired over seeds."""
    seeds = [run["seed"] for run in runs]

    def turned(chosen: Sequence[dict[str, Any]]) -> Point:
        """Both numbers in each other's place, so that the front is read at equal loss."""
        return Point(
            chosen[0]["name"],
            -np.stack([lost(run, "held") for run in chosen]),
            -np.stack([learned(run) for run in chosen]),
        )

    others = [turned([r for r in some if r["seed"] in seeds]) for some in fixed]
    mine = turned(runs)
    at = -plain_loss(others, mine.learned)
    return float(at.mean()), interval(np.stack([learned(run) for run in runs]) - at)


def page(results: Path, seeds: Sequence[int]) -> str:
    """The text of docs/budget_study.md."""
    budgets = {b: load(results, f"budget-{b:g}", seeds) for b in BUDGETS}
    fixed = {f: load(results, f"fixed-{f:g}", seeds) for f in FACTORS}
    whole = {f: runs for f, runs in fixed.items() if runs}
    every = [(b, run) for b, runs in budgets.items() for run in runs]
    over = [(b, run) for b, run in every if float(lost(run, "held").mean()) > b]
    surely = [1 for b, run in over if macro_interval(parts(run, "held"), CONFIDENCE).low > b]
    most = int(binom.ppf(CONFIDENCE, len(every), 1 - CONFIDENCE))
    allowed = (
        f"Of {len(every)} runs that each break it with a chance of {1 - CONFIDENCE:.0%}, up to {most} do in 95 of 100 "
        "repetitions."
    )
    head = ("budget", "seeds", "feasible", "kept to", "lost (control)", "bound", "lost (held)", "above", "learned",
            "fixed, same loss", "difference", "fixed, with hindsight", "difference")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for budget, runs in budgets.items():
        if not runs:
            continue
        have = {run["seed"] for run in runs}
        complete = {f: some for f, some in whole.items() if have <= {r["seed"] for r in some}}
        records = [run["budget"] for run in runs]
        chosen = [next((p for p in r["points"] if p["share"] == r["share"]), None) for r in records]
        seen = [p["loss"]["value"] if p and p["loss"] else 0.0 for p in chosen]
        bounds = [p["upper"] if p and p["upper"] is not None else 0.0 for p in chosen]
        held = np.stack([lost(run, "held") for run in runs])
        gains = np.stack([learned(run) for run in runs])
        compared = ("", "", "", "")
        if complete and len(runs) > 1:
            at, difference = same_loss(runs, list(complete.values()))
            inside = {f: some for f, some in complete.items() if _mean_held(some, have) <= budget}
            best = max(inside, key=lambda f: np.mean([learned(r).mean() for r in _of(inside[f], have)]), default=None)
            if best is not None:
                theirs = np.stack([learned(run) for run in _of(inside[best], have)])
                hindsight = (f"×{best:g}: {100 * theirs.mean():.1f}", points(interval(gains - theirs)))
            else:
                hindsight = ("none is inside", "")
            compared = (f"{100 * at:.1f}", points(difference), *hindsight)
        cells = (
            *(f"{100 * budget:g}", str(len(runs)), f"{sum(r['feasible'] for r in records)} of {len(runs)}"),
            f"{np.mean([r['share'] for r in records]):.2f}",
            *(f"{100 * np.mean(seen):.1f}", f"{100 * np.mean(bounds):.1f}", over_seeds(held)),
            f"{sum(float(row.mean()) > budget for row in held)} of {len(runs)}",
            *(over_seeds(gains), *compared),
        )
        lines.append(cells)
    table = [("factor", "seeds", "lost (held)", "learned"), ("---",) * 4]
    for factor, runs in whole.items():
        held, gains = (np.stack([f(run) for run in runs]) for f in (lambda r: lost(r, "held"), learned))
        table.append((f"{factor:g}", str(len(runs)), over_seeds(held), over_seeds(gains)))
    names = ("budget", "seed", "kept to", "factor", "drift / limit", "lost (control)", "bound", "lost (held)",
             "learned", "learned at the end of training", "s")  # fmt: skip
    shown = [names, ("---",) * len(names)]
    for budget, run in every:
        record = run["budget"]
        chosen_point = next((p for p in record["points"] if p["share"] == record["share"]), None)
        seen_loss = chosen_point["loss"]["value"] if chosen_point and chosen_point["loss"] else 0.0
        bound = chosen_point["upper"] if chosen_point and chosen_point["upper"] is not None else 0.0
        ends = [record["drift"], record["drift_limit"]]
        without = record["learned_without"]
        shown.append(
            (
                *(f"{100 * budget:g}", str(run["seed"]), f"{record['share']:.2f}", f"{record['factor']:.2g}"),
                " / ".join("–" if end is None else f"{end:.3f}" for end in ends),
                *(f"{100 * seen_loss:.1f}", f"{100 * bound:.1f}", f"{100 * lost(run, 'held').mean():.1f}"),
                f"{100 * learned(run).mean():.1f}",
                "–" if without is None else f"{100 * without:.1f}",
                f"{run['seconds']:.0f}",
            )
        )
    sizes = {half: sum(len(v) for k, v in every[0][1]["before"].items() if k.endswith(f"_{half}")) for half in HALVES}
    return _TEXT.format(
        seeds=" ".join(map(str, seeds)),
        families=", ".join(f"`{name}`" for name in FAMILIES),
        items=sizes["control"],
        held=sizes["held"],
        count=len(every),
        confidence=CONFIDENCE,
        over=len(over),
        surely=len(surely),
        allowed=allowed,
        table=_markdown(lines),
        share=SHARE,
        strength=STRENGTH,
        fixed=_markdown(table),
        runs=_markdown(shown),
    )


def points(found: Interval) -> str:
    """As points with their interval."""
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def over_seeds(table: np.ndarray) -> str:
    """The mean of (seeds, items) as points, with its interval; one seed has none."""
    return points(interval(table)) if len(table) > 1 else f"{100 * table.mean():.1f}"


def _of(runs: Sequence[dict[str, Any]], seeds: set[int]) -> list[dict[str, Any]]:
    return [run for run in runs if run["seed"] in seeds]


def _mean_held(runs: Sequence[dict[str, Any]], seeds: set[int]) -> float:
    return float(np.mean([lost(run, "held").mean() for run in _of(runs, seeds)]))


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets; without it nothing is run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="settings: budget-0.1, fixed-2, …")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--items", type=int, default=150, help="questions of the held half")
    parser.add_argument("--control", type=int, default=84, help="questions that the budget is on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "budget_study.md")
    parser.add_argument("--train", type=json.loads, default={}, help="training settings over the bench's, as JSON")
    given = parser.parse_args(arguments)

    from rich.console import Console

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    say = Console(stderr=True, highlight=False, markup=False).print
    study = Study(given.data, given.work, given.results, given.model, given.items, given.control, given.train, say=say)
    for name, seed in study.jobs(given.seeds) if given.data else ():
        if (given.only and name not in given.only) or not study.claim(name, seed):
            continue
        say(f"\n{name}, seed {seed}")
        try:
            carry_out(study, name, seed)
        finally:
            study.release(name, seed)
    if not any(given.results.glob("budget-*.json")):
        say("No results yet. Give --data.")
        return 1
    write(given.page, page(given.results, given.seeds))
    print(f"{given.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
