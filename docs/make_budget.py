"""Writes the tables and pictures of docs/budget.md: items that are needed, and a run with a budget.

python docs/make_budget.py            the table of items alone: a second
python docs/make_budget.py --run DIR  also the run and its pictures: a model of 0.1 M weights, a few minutes on a CPU
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retain.functional.budget import items_needed
from retain.results import Results, write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "budget.md"
LIMITS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
FLIPS = (0.0, 0.02, 0.05, 0.1)
LETTERS, TAUGHT, STEPS, BUDGET = 400, 512, 100, 0.03


def table() -> str:
    """Items in all, by the budget and by how many answers change."""
    lines = [
        "| you may lose at most | " + " | ".join(f"{flips:.0%} change" if flips else "none changes" for flips in FLIPS),
        "|---|" + "---:|" * len(FLIPS),
    ]
    lines[0] += " |"
    for limit in LIMITS:
        word = "point" if limit == 0.01 else "points"
        cells = " | ".join(f"{items_needed(limit, 0.95, flips):,}" for flips in FLIPS)
        lines.append(f"| {100 * limit:g} {word} | {cells} |")
    return "\n".join(lines)


def put(text: str, name: str, made: str) -> str:
    """The page with what stands between its marks of a name made new.

    Raises:
        ValueError: there are no such marks.
    """
    marks = re.compile(rf"(<!-- {name}: made by docs/make_budget.py -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"docs/budget.md has no marks for '{name}'")
    return marks.sub(lambda found: f"{found[1]}\n{made}\n\n{found[2]}", text)


def run(folder: Path) -> Results:
    """A small model that knows facts and can turn words around learns other facts, on a budget."""
    sys.path.insert(0, str(ROOT / "bench"))
    import small_world

    from retain.config import parse
    from retain.pipeline import run as carry_out

    small_world.pretrained(0, ROOT / "bench" / "out").save_pretrained(folder / "model")
    small_world.tokenizer().save_pretrained(folder / "model")
    known = [*small_world.facts("A"), *small_world.words()[:LETTERS]]
    questions = (
        {"probe": "what it knew", "kind": "answer", "prompt": p, "answers": [a], "max_tokens": 6} for p, a in known
    )
    _lines(folder / "old.jsonl", questions)
    taught = ({"prompt": p, "response": r} for p, r in small_world.lessons("B", TAUGHT, 0))
    _lines(folder / "prices" / "train.jsonl", taught)
    anchors = [" ".join(row) for row in small_world.lessons("A", 128, 2)]
    write_text(folder / "anchors.txt", "\n\n".join(anchors) + "\n")
    train = {"max_steps": STEPS, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "use_cpu": True}
    return carry_out(
        parse(
            {
                "model": str(folder / "model"),
                "tasks": [{"data": str(folder / "prices"), "test": "same"}],  # facts can only be remembered
                "methods": [{"distill": {"strength": 0.1}}],  # weak on purpose, and no old rows
                "probes": {"reference": [str(folder / "old.jsonl")]},
                "budget": {"lose_at_most": BUDGET, "every": 5, "anchors": str(folder / "anchors.txt")},
                "train": train | {"max_length": 32, "bf16": False, "save_strategy": "no"},
                "output": str(folder / "run"),
            }
        )
    )


def said(results: Results) -> str:
    """What the run came to, in numbers of its own."""
    from retain.report import budget

    (one,) = results.budgets
    (block,) = budget.blocks(results)
    rows = "\n".join(f"| {name} | {value} {interval} |" for name, value, interval, _ in block.numbers)
    return (
        "![How far one may go](budget.svg)\n\n![Held back while training](budget_held.svg)\n\n"
        f"{block.words} Made by `python docs/make_budget.py --run DIR`: {one.items} items, seed {results.seed}.\n\n"
        f"| | |\n|---|---|\n{rows}"
    )


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="FOLDER", help="also carry out the run, in this folder, and draw it")
    folder = parser.parse_args().run
    text = put(PAGE.read_text(encoding="utf-8"), "items", table())
    if folder is not None:
        from retain.report.budget_figures import draw
        from retain.report.canvas import INK
        from retain.results import load_metrics

        results = run(Path(folder))
        pictures = {picture.name: picture for picture in draw(results, load_metrics(Path(folder) / "run"))}
        for name, file in (("budget-1", "budget.svg"), ("held-1", "budget_held.svg")):
            write_text(PAGE.with_name(file), pictures[name].svg.replace(INK, "#767676"))
        text = put(text, "run", said(results))
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
