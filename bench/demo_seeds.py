"""The demo over several seeds: what naive and retained lose and learn. Prints a Markdown table.

    python bench/demo_seeds.py                 # seeds 0 1 2 into bench/out/demo; finished seeds are reused
    python bench/demo_seeds.py --seeds 0 1 2 3 4
    python bench/demo_seeds.py --rows 112      # new rows per task; the demo's own number by default
    python bench/demo_seeds.py --picture docs/demo.svg     # draws the first seed, too
    python bench/demo_seeds.py --out bench/out/l2 --methods '[{lora: {r: 16}}, {l2sp: {strength: 1}}]'

Losses are on the generated answers of the core suite (facts, sums, instructions), in points, paired over items.
The last row's intervals are over seeds and items (two-level bootstrap): what to expect of the next run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import yaml

from retain import demo
from retain.cli.common import quiet_libraries
from retain.functional.statistics import two_level_interval
from retain.report import figures
from retain.report.canvas import INK
from retain.results import load_items, load_results


def losses(folder: Path) -> np.ndarray:
    """[2, n]: base − naive and base − retained per generated item, in the order of the items."""
    results = load_results(folder / "naive")
    written = {p.name for p in results.probes if p.role == "reference" and p.kind in ("answer", "instruction")}

    def scores(run: str, stage: str) -> np.ndarray:
        rows = load_items(folder / run / "probes" / f"{stage}.parquet")
        return np.array([row["score"] for row in rows if row["probe"] in written])

    base = scores("naive", results.stages[0])
    return np.stack([base - scores(run, results.stages[-1]) for run in ("naive", "retained")])


def points(interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/out/demo"))
    parser.add_argument("--rows", type=int, default=demo.ROWS)
    parser.add_argument("--items", type=int, default=demo.ITEMS, help="items per probe")
    parser.add_argument("--methods", type=yaml.safe_load, help="another recipe, as YAML; give it its own --out")
    parser.add_argument("--picture", type=Path, help="where to draw the first seed")
    given = parser.parse_args()
    quiet_libraries()
    lines, per_seed, learned = [], [], []
    for seed in given.seeds:
        folder, start = given.out / str(seed), time.monotonic()
        demo.run_demo(folder, seed=seed, rows=given.rows, items=given.items, methods=given.methods)
        runs = [load_results(folder / name) for name in ("naive", "retained")]
        found, share = demo.compare(folder / "naive", folder / "retained", (runs[0], runs[1]))
        new = [np.mean([r.matrix[j + 1][j] for j in range(len(r.tasks))]) for r in runs]
        last = [np.mean(r.matrix[-1]) for r in runs]
        ratio = f"{found.ratio.value:.2f} [{found.ratio.low:.2f}, {found.ratio.high:.2f}]" if found.ratio else "–"
        lines.append(
            f"| {seed} | {points(found.lost_a)} | {points(found.lost_b)} | {ratio} | {new[0]:.2f} | {new[1]:.2f} "
            f"({share:.0%}) | {last[0]:.2f} | {last[1]:.2f} |"
        )
        per_seed.append(losses(folder))
        learned.append(share)
        if given.picture and seed == given.seeds[0]:
            drawn = figures.scores(runs[0], [("retained", runs[1])])
            given.picture.write_text(drawn.svg.replace(INK, "#767676"), encoding="utf-8")  # seen on white and on black
        print(f"seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    print("\n| seed | lost, naive | lost, retained | retained / naive | learned, naive | learned, retained "
          "| both tasks at the end, naive | retained |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    if len(per_seed) > 1:
        table = np.stack(per_seed)  # [seeds, 2, items]
        naive, retained = (two_level_interval(table[:, i]) for i in (0, 1))
        excess = two_level_interval(table[:, 1] - 0.2 * table[:, 0])
        print(
            f"| all | {points(naive)} | {points(retained)} | {retained.value / naive.value:.2f} | | "
            f"({np.mean(learned):.0%}) | | |"
        )
        print(f"\nretained − naive/5: {points(excess)} points (at most a fifth where the upper end is below 0)")


if __name__ == "__main__":
    main()
