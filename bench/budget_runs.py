"""What bench/budget.py runs: questions to keep in two halves, rows to learn, and one run that leaves a small file.

The control half is what a budget is on; the held half is never shown to it, and tells what was really lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retention_runs import write

from retain.comparison import share_baseline
from retain.config import RunConfig, parse
from retain.results import load_items, load_results
from retain.rundir import BASE, RunDirectory

#: Families whose rows are short and which plain training learns (bench/learnable.py).
FAMILIES = ("calendar_arithmetic", "count_bits", "gcd", "letter_counting", "number_sequence", "syllogism")
TASK, HALVES = "reasoning", ("control", "held")
BUDGETS = (0.05, 0.08, 0.12, 0.18)
FACTORS = (0.0, 1.0, 4.0)  # of the fixed settings, on the strength that a budget begins with
SHARE, STRENGTH = 0.1, 0.1  # of replayed rows; of distillation
_TRAIN: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 20,
    "learning_rate": 1e-3,
    "max_length": 128,
    "save_strategy": "no",
}


def recipe(factor: float) -> list[Any]:
    """LoRA with replay and distillation at so many times their usual setting."""
    protect: list[Any] = [
        {"replay": {"fraction": min(0.5, SHARE * max(1.0, factor)), "source": "old", "rows": 128}},
        {"distill": {"strength": STRENGTH * factor}},
    ]
    return [{"lora": {"r": 16}}, *(protect if factor else [])]


@dataclass(frozen=True)
class Study:
    """Where everything is, and how large.

    Args:
        data: folder of data sets: reasoning_gym, facts_countries, instruct_lfs.
        work: run directories, which may be deleted.
        results: the small files, one per run.
        items: of the held half, at most.
        control: of the half that the budget is on: a run asks these several times.
        train: over the study's own settings, for quick tests.
        budget: further settings of every budget.
    """

    data: Path
    work: Path
    results: Path
    model: str = "starter"
    items: int = 150
    control: int = 84
    train: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def path(self, name: str, seed: int) -> Path:
        """The result of a run."""
        return self.results / f"{name}-seed{seed}.json"

    def jobs(self, seeds: list[int]) -> Iterator[tuple[str, int]]:
        """Runs that are not done: the budgets of each seed, then the fixed settings."""
        for names in ([f"budget-{b:g}" for b in BUDGETS], [f"fixed-{f:g}" for f in FACTORS]):
            for seed, name in itertools.product(seeds, names):
                if not self.path(name, seed).is_file():
                    yield name, seed

    def claim(self, name: str, seed: int) -> bool:
        """Whether this process is the one that carries out a run: it is neither done nor another one's."""
        place = self.work / f"{name}-seed{seed}.claimed"
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.touch(exist_ok=False)
        except FileExistsError:
            return False
        return not self.path(name, seed).is_file()

    def release(self, name: str, seed: int) -> None:
        """Done, or broken off: another process may go on."""
        (self.work / f"{name}-seed{seed}.claimed").unlink(missing_ok=True)

    def config(self, name: str, seed: int) -> RunConfig:
        """The configuration of `budget-LOSS` or `fixed-FACTOR`."""
        kind, _, number = name.partition("-")
        values: dict[str, Any] = {
            "name": name,
            "model": self.model,
            "tasks": [{"name": TASK, "data": str(self._rows())}],
            "old": str(self.data / "instruct_lfs" / "train.jsonl"),
            "methods": recipe(1.0 if kind == "budget" else float(number)),
            "probes": {"reference": [str(self._half(half)) for half in HALVES], "tasks": {"score": "exact"}},
            "train": _TRAIN | self.train,
            "seed": seed,
            "output": str(self.work / f"{name}-seed{seed}"),
        }
        if kind == "budget":
            on = {"lose_at_most": float(number), "on": [str(self._half("control"))]}
            values["budget"] = {"every": 5, "anchor_count": 16, "calibrate": 1, "tries": 4} | on | self.budget
        return parse(values, name)

    def _rows(self) -> Path:
        folder = self.work / TASK
        for split in ("train", "test"):
            if not (folder / f"{split}.jsonl").is_file():
                rows = _read(self.data / "reasoning_gym" / f"{split}.jsonl")
                write(folder / f"{split}.jsonl", _lines(r for r in rows if r["task"] in FAMILIES))
        return folder

    def _half(self, half: str) -> Path:
        folder = self.work / half
        if not folder.is_dir():
            chosen = halves(self.data)[half]
            for probe in sorted({row["probe"] for row in chosen}):
                mine = [row for row in chosen if row["probe"] == probe]
                most = (self.items if half == "held" else self.control) // 3
                write(folder / f"{probe}.jsonl", _lines(mine[:most]))
        return folder


def halves(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Questions by half, in a fixed shuffled order: capitals, continents and sums."""
    rows = _read(data / "facts_countries" / "test.jsonl")
    found = [_fact(row) for row in rows if row["relation"] in ("capital", "continent")]
    numbers = [(a, b) for a in range(2, 40) for b in range(2, 40)]
    random.Random("sums").shuffle(numbers)
    found += [
        {"probe": "sums", "prompt": f"What is {a} + {b}? Answer with just the number.", "answers": [str(a + b)]}
        for a, b in numbers[:400]
    ]
    random.Random("questions").shuffle(found)
    parts: dict[str, list[dict[str, Any]]] = {half: [] for half in HALVES}
    for row in found:
        half = HALVES[hashlib.sha256(row["prompt"].encode()).digest()[0] % 2]
        parts[half].append(row | {"kind": "answer", "max_tokens": 12, "probe": f"{row['probe']}_{half}"})
    return parts


def _fact(row: dict[str, Any]) -> dict[str, Any]:
    if row["relation"] == "capital":
        prompt = row["prompt"].replace("The capital of", "What is the capital of").removesuffix(" is") + "?"
        return {"probe": "capitals", "prompt": prompt, "answers": [row["response"]]}
    country = row["prompt"].partition(" is a country")[0]
    return {"probe": "continents", "prompt": f"On which continent is {country}?", "answers": [row["response"]]}


def carry_out(study: Study, name: str, seed: int) -> None:
    """One run and its file: scores of every item before and after, and what became of the budget."""
    from retain.pipeline import run

    config, first = study.config(name, seed), RunDirectory(study.work / "base")
    if first.items(BASE).is_file():
        share_baseline(first, config)
    start = time.monotonic()
    results = run(config, study.say)
    place = RunDirectory(config.directory)
    if not first.items(BASE).is_file():
        write(first.items(BASE), place.items(BASE).read_bytes())
    before, after = (load_items(place.items(stage)) for stage in (BASE, results.stages[-1]))
    found = {
        "name": name,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "train_seconds": results.training[-1].seconds,
        "before": scores(before),
        "after": scores(after),
        "budget": load_results(config.directory).budgets[0].model_dump() if results.budgets else None,
    }
    write(study.path(name, seed), json.dumps(found, ensure_ascii=False) + "\n")


def scores(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Probe → a digit per item, 1 for right, in the order of the items."""
    found: dict[str, str] = {}
    for row in rows:
        found[row["probe"]] = found.get(row["probe"], "") + "01"[int(row["score"] > 0.5)]
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
