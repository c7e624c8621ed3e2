"""What the methods cost: time and memory against the plain thing, measured side by side. Prints a table.

    python bench/speed.py                          # all rows, and every method, on the starter model
    python bench/speed.py --only ewc choice        # some of them; the others are kept as last measured
    python bench/speed.py --methods sam replay     # a step and the memory of these methods
    python bench/speed.py --items items.jsonl      # other questions than those of the core suite
    python bench/speed.py --write                  # also writes docs/cost.md

Every ratio compares two things of one process that take turns (A B A B …), so that whatever else the machine does
hits both. Ends with exit code 1 when a bound is missed. Results: bench/out/speed.json. Methods that are in there,
measured under the same circumstances, are measured again only when they are named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import method_costs
from side_by_side import Company, Line, Settings

_AT_ONCE = 3  # methods that take turns with what they are compared with: each has a model and an optimizer of its own
ROWS = ("ewc", "ewc-memory", "ewc-autograd", "fisher", "distill", "distill-memory", "choice", "startup", "monitor")
PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
HEAD = ("work", "against", "measured", "range", "at most", "met")

_TEXT = """# What it costs

Written by `make bench`: {machine}, {day}, {model}, {numbers}.
A ratio is the median over at least {repeats} pairs that were measured in turn in one process; the range is the smallest
and the largest pair. Steps are optimizer steps of `ContinualTrainer` with the settings that `retain run` takes on
this machine, full fine-tuning unless LoRA is said; a plain step is the same trainer without methods. Memory is
what PyTorch's allocator hands out at the same time, weights included.

{table}

How each line was measured:

{details}
{methods}"""
_METHODS = """
## Every method

One optimizer step (rows of one order, about 50 tokens) and the peak memory of each method as its example uses it, in
a first task, against the same training without it: `plain` is full fine-tuning, the other names are what the example
combines it with. "Should be" counts passes: a plain step is a forward and a backward pass, and the backward one costs
two forward ones. What a method does once, before or after training, is not in a step; its page says what that is.

{table}
"""


def measure(row: str, settings: Settings) -> list[Line]:
    """The lines of one row of the table."""
    if row == "choice":
        import against_harness

        return against_harness.choice(settings)
    if row == "startup":
        import startup

        return startup.startup(settings)
    if row == "monitor":
        import watching

        return watching.monitor(settings)
    import training_steps

    measured: dict[str, Callable[[Settings], list[Line]]] = {
        "ewc": training_steps.ewc,
        "ewc-memory": training_steps.ewc_memory,
        "ewc-autograd": training_steps.ewc_autograd,
        "fisher": training_steps.fisher,
        "distill": training_steps.distill,
        "distill-memory": training_steps.distill_memory,
    }
    return measured[row](settings)


def cells(line: Line) -> tuple[str, ...]:
    """One line of the table as text."""
    spread = "–" if line.low is None else f"{line.show(line.low)}–{line.show(line.high)}"
    found = line.show(line.value)
    return line.work, line.against, found, spread, line.show(line.bound), "yes" if line.met else "NO"


def table(lines: list[Line]) -> str:
    """The lines as a Markdown table."""
    rows = [HEAD, ("---",) * len(HEAD), *map(cells, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(about: dict[str, Any], lines: list[Line], costs: list[method_costs.Cost]) -> str:
    """The page for docs/."""
    details = "\n".join(f"- {line.work}, against {line.against}: {line.detail}" for line in lines)
    every = _METHODS.format(table=method_costs.table(costs)) if costs else ""
    return _TEXT.format(table=table(lines), details=details, methods=every, **about)


def about(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on; numbers of another setting are never put into the same table."""
    import torch

    name = next((r.split(":")[1].strip() for r in _cpu_lines() if r.startswith("model name")), platform.machine())
    precision = "float32 weights, bfloat16 autocast" if settings.half else "float32"
    return {
        "machine": f"{name}, {torch.get_num_threads()} threads, {_gpu()}PyTorch {torch.__version__}",
        "model": "SmolLM2-135M-Instruct" if settings.model == "starter" else Path(settings.model).name,
        "numbers": precision,
        "repeats": settings.repeats,
    }


def _gpu() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def merged(path: Path, about: dict[str, Any], new: dict[str, list[Line]]) -> dict[str, list[Line]]:
    """Rows measured now over those measured before under the same circumstances, in the order of `ROWS`."""
    known: dict[str, list[Line]] = {}
    if path.is_file():
        before = json.loads(path.read_text())
        if before["about"] == about:
            known = {row: [Line(**line) for line in lines] for row, lines in before["rows"].items()}
    known |= new
    return {row: known[row] for row in ROWS if row in known}


def known_costs(path: Path, about: dict[str, Any]) -> dict[str, method_costs.Cost]:
    """Methods that were measured under the same circumstances; not those that failed."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    found = before.get("methods", {}) if before["about"] == about else {}
    return {name: method_costs.Cost(**cost) for name, cost in found.items() if not cost["problem"]}


def save(path: Path, about: dict[str, Any], rows: dict[str, list[Line]], costs: dict[str, method_costs.Cost]) -> None:
    """Everything measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    lines = {name: [vars(line) for line in found] for name, found in rows.items()}
    written = {"about": about, "rows": lines, "methods": {name: vars(cost) for name, cost in costs.items()}}
    partial.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    all_methods = method_costs.names()
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--methods", nargs="+", choices=all_methods, metavar="METHOD", help="these, measured again")
    parser.add_argument("--model", default="starter", help="starter, or a folder")
    parser.add_argument("--repeats", type=int, default=5, help="pairs per ratio")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--data", help="training rows; by default orders of the demo, three to a row")
    parser.add_argument("--items", help="multiple-choice items; by default those of the core suite")
    parser.add_argument("--count", type=int, default=200, help="multiple-choice items at most")
    parser.add_argument("--out", type=Path, default=Path("bench/out/speed.json"))
    parser.add_argument("--write", action="store_true", help="write docs/cost.md")
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)

    from rich.console import Console

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    settings = Settings(given.model, given.repeats, given.batch, given.data, given.items, given.count)
    circumstances = about(settings)
    screen = Console(stderr=True)
    new: dict[str, list[Line]] = {}
    rows, costs = merged(given.out, circumstances, new), known_costs(given.out, circumstances)
    whole = given.only is None and given.methods is None
    for row in ROWS if whole else given.only or ():
        screen.print(f"[dim]{row} …[/dim]")
        with Company() as others:
            found = measure(row, settings)
        new[row] = [replace(line, detail=line.detail + _company(others)) for line in found]
        for line in new[row]:
            screen.print(" · ".join(cells(line)), highlight=False)
        rows = merged(given.out, circumstances, new)
        save(given.out, circumstances, rows, costs)
    peaks: dict[str, int] = {}
    pending = [n for n in all_methods if n not in costs] if whole else given.methods or ()
    for group in method_costs.together(pending, _AT_ONCE):
        with Company() as others:
            found = method_costs.measure(group, settings, peaks)
        for name, cost in found.items():
            costs[name] = replace(cost, detail=cost.detail + _company(others))
            screen.print(" · ".join(costs[name].cells()), highlight=False)
        save(given.out, circumstances, rows, costs)
    lines = [line for one in rows.values() for line in one]
    ordered = [costs[name] for name in all_methods if name in costs]
    print("\n\n".join([table(lines), *([method_costs.table(ordered)] if ordered else [])]))
    if given.write:
        given.page.write_text(page(circumstances | {"day": date.today().isoformat()}, lines, ordered))
    return 0 if all(one.met for one in [*lines, *ordered]) else 1


def _company(others: Company) -> str:
    return f" Meanwhile other programs used {others.share:.0%} of the machine." * (others.share > 0.05)


if __name__ == "__main__":
    sys.exit(main())
