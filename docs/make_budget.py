"""Writes the tables and pictures of docs/budget.md: items that are needed, and two runs with a budget.

python docs/make_budget.py            the table of items alone: a second
python docs/make_budget.py --run DIR  also two runs and pictures: a model of 0.1 M weights, minutes on a CPU
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
LETTERS, TAUGHT, STEPS = 400, 512, 100
#: Name of a run → its methods and its budget: weak on purpose, then with old rows.
RUNS: dict[str, tuple[list[Any], float]] = {
    "bare": ([{"distill": {"strength": 0.1}}], 0.03),
    "replay": ([{"replay": {"fraction": 0.2}}, {"distill": {"strength": 1.0}}], 0.01),
}


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


def run(folder: Path, methods: list[Any], limit: float) -> Results:
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
    anchors = [f"<user> {p} <end> <answer> {r} <end>" for p, r in small_world.lessons("A", 128, 2)]
    write_text(folder / "anchors.txt", "\n\n".join(anchors) + "\n")
    _lines(folder / "replay.jsonl", ({"prompt": p, "response": r} for p, r in small_world.lessons("A", 96, 1)))
    train = {"max_steps": STEPS, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "use_cpu": True}
    return carry_out(
        parse(
            {
                "model": str(folder / "model"),
                "tasks": [{"data": str(folder / "prices"), "test": "same"}],  # facts can only be remembered
                "old": str(folder / "replay.jsonl"),
                "methods": methods,
                "probes": {"reference": [str(folder / "old.jsonl")]},
                "budget": {"lose_at_most": limit, "every": 5, "anchors": str(folder / "anchors.txt")},
                "train": train | {"max_length": 32, "bf16": False, "save_strategy": "no"},
                "output": str(folder / "run"),
            }
        )
    )


def said(bare: Results, replay: Results) -> str:
    """What the runs came to, in numbers of their own."""
    from retain.report import budget

    first, second = (budget.blocks(results)[0] for results in (bare, replay))
    rows = "\n".join(f"| {name} | {f'{value} {end}'.strip()} | {why} |" for name, value, end, why in first.numbers)
    (better,) = (value for name, value, *_ in second.numbers if name == "New task")
    return (
        "![How far one may go](budget.svg)\n\n"
        "A small model learns new facts, with little to hold it back (`distill` at 0.1, no old rows). Made by\n"
        f"`python docs/make_budget.py --run DIR`, seed {bare.seed}:\n\n> {first.words}\n\n"
        f"| number | value | what it means |\n|---|---|---|\n{rows}\n\n"
        "![Held back while training](budget_held.svg)\n\n"
        "The same with old rows mixed in (`replay` at 0.2, `distill` at 1), on a tighter budget:\n\n"
        f"> {second.words} New task: {better}.\n\n"
        "Three settings were tried, one seed each; these two were chosen to show what a budget does. They compare\n"
        "nothing."
    )


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="FOLDER", help="also carry out the runs, in this folder, and draw the first")
    folder = parser.parse_args().run
    text = put(PAGE.read_text(encoding="utf-8"), "items", table())
    if folder is not None:
        from retain.report.budget_figures import draw
        from retain.report.canvas import INK
        from retain.results import load_metrics

        found = {name: run(Path(folder) / name, *about) for name, about in RUNS.items()}
        metrics = load_metrics(Path(folder) / "bare" / "run")
        pictures = {picture.name: picture for picture in draw(found["bare"], metrics)}
        for name, file in (("budget-1", "budget.svg"), ("held-1", "budget_held.svg")):
            write_text(PAGE.with_name(file), pictures[name].svg.replace(INK, "#767676"))
        text = put(text, "run", said(**found))
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
