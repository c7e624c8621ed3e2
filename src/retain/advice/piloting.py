"""The likeliest recipes, run briefly on the real model and some of the rows, and put into order by what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.advice.advisor import Advice
from retain.config import RunConfig, parse
from retain.errors import RunError
from retain.results import Estimate, Results
from retain.rundir import RunDirectory, share_baseline

#: Optimizer steps of each task, items of every old probe, and test rows of a task, unless others are asked for.
STEPS, ITEMS, TEST_ROWS = 20, 8, 24
#: File of the folder in which the order is kept.
TABLE = "pilot.json"


@dataclass(frozen=True)
class Line:
    """One recipe in a pilot. `learned` and `lost` are shares of the items with their 95 % intervals."""

    recipe: str
    learned: Estimate | None
    lost: Estimate | None
    balance: float
    seconds: float

    def cells(self) -> tuple[str, str, str, str, str]:
        """As a table shows it."""
        return (self.recipe, _points(self.learned), _points(self.lost), f"{self.balance:.3f}", f"{self.seconds:.0f} s")


HEAD = ("recipe", "learned, points", "lost, points", "balance", "time")


@dataclass(frozen=True)
class Pilot:
    """Recipes in the order of their balance, the best first."""

    lines: list[Line]
    steps: int

    @property
    def clear(self) -> bool:
        """Whether what the first two lost, or learned, differs by more than the intervals allow."""
        if len(self.lines) < 2:
            return True
        first, second = self.lines[:2]
        pairs = [(first.learned, second.learned), (second.lost, first.lost)]
        return any(a is not None and b is not None and a.low > b.high for a, b in pairs)

    def paragraphs(self) -> list[str]:
        """For the comment on top of a configuration."""
        doubt = "" if self.clear else "; the intervals of the first two overlap, so that their order may be chance"
        said = [f"Pilot of {self.steps} steps a task, best balance of kept and learned first{doubt}:"]
        return said + [", ".join(f"{name} {cell}" for name, cell in zip(HEAD, line.cells())) for line in self.lines]


def pilot(
    advice: Advice,
    folder: Path,
    steps: int = STEPS,
    items: int = ITEMS,
    test_rows: int = TEST_ROWS,
    say: Callable[[str], None] = print,
) -> Pilot:
    """Run every recipe of `advice.ranking` with few steps, rows and items; the same call goes on after a stop.

    Args:
        folder: of the runs; the base is asked once, for all.
        steps: of the optimizer, for each task.
        items: of every old probe at most; two or more.
        test_rows: of a task, held out and asked, at most.

    Raises:
        RetainError: as `pipeline.run`; the folder holds another pilot.
    """
    from retain.pipeline import run

    lines, first = [], None
    for name in advice.ranking:
        config = _config(advice.with_recipe(name), folder / name.replace(" ", "-"), steps, items, test_rows)
        say(f"pilot of {name}: {config.directory}")
        if first is not None:
            share_baseline(RunDirectory(first.directory), config)
        try:
            results = run(config, lambda line: None)
        except RunError as error:
            raise RunError(f"pilot: {error}") from error
        first = first or config
        lines.append(_line(name, results))
    found = Pilot(sorted(lines, key=lambda line: -line.balance), steps)
    _keep(found, folder)
    return found


def _config(advice: Advice, place: Path, steps: int, items: int, test_rows: int) -> RunConfig:
    """A short run of an advised configuration."""
    values: dict[str, Any] = advice.values
    together = values["train"]["per_device_train_batch_size"] * values["train"]["gradient_accumulation_steps"]
    rows = max(2 * together, steps * together)
    values["tasks"] = [{**task, "limit": rows, "test_limit": test_rows} for task in values["tasks"]]
    values["train"] |= {"max_steps": steps, "save_strategy": "no"}
    values["probes"] = {"limit": items, "task_limit": test_rows}
    values.pop("budget", None)  # made sure of in the whole run, on more items
    return parse(values | {"name": place.name, "output": str(place)}, "pilot")


def _line(name: str, results: Results) -> Line:
    verdict = results.verdict
    if verdict is None:
        raise RunError("pilot: no old abilities were asked, so recipes cannot be compared. Give reference probes.")
    lost = verdict.difference
    turned = None if lost is None else Estimate(value=-lost.value, low=-lost.high, high=-lost.low)
    seconds = sum(step.seconds for step in results.training)
    return Line(name, verdict.learned, turned, verdict.balance, seconds)


def _keep(found: Pilot, folder: Path) -> None:
    from retain.results import write_text

    def plain(estimate: Estimate | None) -> Mapping[str, float] | None:
        return None if estimate is None else estimate.model_dump()

    lines = [
        {"recipe": line.recipe, "learned": plain(line.learned), "lost": plain(line.lost), "balance": line.balance,
         "seconds": line.seconds} for line in found.lines
    ]  # fmt: skip
    write_text(folder / TABLE, json.dumps({"steps": found.steps, "order": lines}, indent=1) + "\n")


def _points(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
