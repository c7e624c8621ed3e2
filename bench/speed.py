"""What the methods cost: time and memory against the plain thing, measured side by side. Prints a table.

    python bench/speed.py                          # all rows on the starter model
    python bench/speed.py --only ewc choice        # some of them; the others are kept as last measured
    python bench/speed.py --items items.jsonl      # other questions than those of the core suite
    python bench/speed.py --write                  # also writes docs/cost.md

Every ratio compares two things of one process that take turns (A B A B …), so that whatever else the machine does
hits both. Ends with exit code 1 when a bound is missed. Results: bench/out/speed.json.
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

from side_by_side import Company, Line, Settings

ROWS = ("ewc", "ewc-memory", "ewc-autograd", "fisher", "distill", "distill-memory", "choice", "startup")
PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
HEAD = ("work", "against", "measured", "range", "at most", "met")

_TEXT = """# What it costs

Written by `make bench`: {machine}, {day}, {model}, {numbers}.
A ratio is the median over {repeats} pairs that were measured in turn in one process; the range is the smallest
and the largest pair. Steps are optimizer steps of `ContinualTrainer` with the settings that `retain run` takes on
this machine, full fine-tuning unless LoRA is said; a plain step is the same trainer without methods. Memory is
what PyTorch's allocator hands out at the same time, weights included.

{table}

How each line was measured:

{details}
"""


def measure(row: str, settings: Settings) -> list[Line]:
    """The lines of one row of the table."""
    if row == "choice":
        import against_harness

        return against_harness.choice(settings)
    if row == "startup":
        import startup

        return startup.startup(settings)
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


def page(about: dict[str, Any], lines: list[Line]) -> str:
    """The page for docs/."""
    details = "\n".join(f"- {line.work}, against {line.against}: {line.detail}" for line in lines)
    return _TEXT.format(table=table(lines), details=details, **about)


def about(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on; numbers of another setting are never put into the same table."""
    import torch

    name = next((r.split(":")[1].strip() for r in _cpu_lines() if r.startswith("model name")), platform.machine())
    precision = "float32 weights, bfloat16 autocast" if settings.half else "float32"
    return {
        "machine": f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}",
        "model": "SmolLM2-135M-Instruct" if settings.model == "starter" else Path(settings.model).name,
        "numbers": precision,
        "repeats": settings.repeats,
    }


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
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
    for row in given.only:
        screen.print(f"[dim]{row} …[/dim]")
        with Company() as others:
            found = measure(row, settings)
        note = f" Meanwhile other programs used {others.share:.0%} of the machine."
        new[row] = [replace(line, detail=line.detail + note * (others.share > 0.05)) for line in found]
        for line in new[row]:
            screen.print(" · ".join(cells(line)), highlight=False)
        rows = merged(given.out, circumstances, new)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        partial = given.out.with_name(given.out.name + ".part")
        written = {name: [vars(line) for line in lines] for name, lines in rows.items()}
        partial.write_text(json.dumps({"about": circumstances, "rows": written}, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, given.out)
    lines = [line for one in rows.values() for line in one]
    print(table(lines))
    if given.write:
        given.page.write_text(page(circumstances | {"day": date.today().isoformat()}, lines))
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
