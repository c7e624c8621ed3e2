"""Which families of a data set plain training can learn, found on training rows alone: of each family ten rows are held
out and asked before and after. bench/retention.py learns those that came out here.

    python bench/learnable.py --data DATA/reasoning_gym --seeds 10 11         # prints the table and the families
    python bench/learnable.py --data DATA/reasoning_gym --only lora-0.001     # one of several processes

A family is learned when its gain in exact answers, over all settings and seeds, is at least ten points. Every run
leaves a file in --out and is not run again while that is there.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from retention_runs import write

from retain.functional.statistics import two_level_interval

HELD, LONGEST, GAIN = 10, 192, 0.10  # rows per family, tokens of a row, share of answers
SETTINGS: dict[str, tuple[list[Any], float]] = {
    **{f"full-{rate:g}": (["none"], rate) for rate in (5e-5, 1e-4)},
    **{f"lora-{rate:g}": ([{"lora": {"r": 16}}], rate) for rate in (5e-4, 1e-3)},
}


def split(source: Path, folder: Path, tokenizer: Any) -> list[str]:
    """Train and test rows from the training rows of families whose rows are short; the family of each test row."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (source / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        families[row["task"]].append(row)
    train, test = [], []
    for rows in families.values():
        longest = max(len(ids) for ids in tokenizer([r["prompt"] + r["response"] for r in rows])["input_ids"])
        if longest + 40 <= LONGEST:  # the chat template's own tokens
            train += rows[HELD:]
            test += rows[:HELD]
    for name, part in (("train", train), ("test", test)):
        write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return [row["task"] for row in test]


def exact(path: Path, probe: str) -> list[float]:
    """Whether each answer is the accepted one and nothing else."""
    from retain.results import load_items

    return [json.loads(row["details"])["exact_match"] for row in load_items(path) if row["probe"] == probe]


def measure(name: str, seed: int, epochs: int, out: Path, families: list[str], model: str) -> None:
    """One training, and exact answers before and after by family."""
    from retain.config import parse
    from retain.pipeline import run
    from retain.rundir import RunDirectory

    methods, rate = SETTINGS[name]
    values = {
        "name": name, "model": model, "seed": seed, "methods": methods,
        "tasks": [{"name": "families", "data": str(out / "rows")}],
        "probes": {"reference": ["core"], "limit": 2, "task_limit": None},
        "train": {"learning_rate": rate, "num_train_epochs": epochs, "per_device_train_batch_size": 8,
                  "max_length": LONGEST, "save_strategy": "no"},
        "output": str(out / "runs" / f"{name}-seed{seed}"),
    }  # fmt: skip
    results, place = run(parse(values, name)), RunDirectory(Path(values["output"]))
    before, after = (exact(place.items(results.stages[i]), "families") for i in (0, -1))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"before": [], "after": []})
    for family, b, a in zip(families, before, after, strict=True):
        found[family]["before"].append(b)
        found[family]["after"].append(a)
    write(out / f"{name}-seed{seed}.json", json.dumps(found) + "\n")


def table(out: Path) -> tuple[str, list[str]]:
    """What every setting learned by family, and the families that are learned."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*-seed*.json"))}
    settings = [name for name in SETTINGS if any(run.startswith(name + "-seed") for run in runs)]
    lines, chosen = (
        ["| family | before | " + " | ".join(settings) + " | gain |", "|" + "---|" * (len(settings) + 3)],
        [],
    )
    for family in sorted(next(iter(runs.values()))):

        def mean(prefix: str, family: str = family) -> float:
            return float(np.mean([run[family]["after"] for name, run in runs.items() if name.startswith(prefix)]))

        before = np.array([run[family]["before"] for run in runs.values()])
        gain = two_level_interval(np.array([run[family]["after"] for run in runs.values()]) - before)
        if gain.value >= GAIN:
            chosen.append(family)
        cells = [f"{100 * x:.0f}" for x in (before.mean(), *(mean(name + "-seed") for name in settings))]
        lines.append(f"| {family} | {' | '.join(cells)} | {100 * gain.value:.0f} [{100 * gain.low:.0f}, "
                     f"{100 * gain.high:.0f}] |")  # fmt: skip
    return "\n".join(lines), chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl; rows name their `task`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/out/learnable"))
    parser.add_argument("--model", default="starter")
    given = parser.parse_args()

    from retain.cli.common import quiet_libraries
    from retain.models.load import load_tokenizer

    quiet_libraries()
    families = split(given.data, given.out / "rows", load_tokenizer(given.model))
    for seed in given.seeds:
        for name in given.only:
            if not (given.out / f"{name}-seed{seed}.json").is_file():
                measure(name, seed, given.epochs, given.out, families, given.model)
    text, chosen = table(given.out)
    print(f"{text}\n\nLearned: {' '.join(chosen) or 'none'}")


if __name__ == "__main__":
    main()
