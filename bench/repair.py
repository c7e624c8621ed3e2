"""How much of a lost ability comes back, and at how much of what was learned: naive fine-tunes of the starter
model, repaired. Writes its tables into docs/repair.md.

    python bench/repair.py --data DATA                    # trains what is not there, repairs, writes the page
    python bench/repair.py --data DATA --only full        # one of them
    python bench/repair.py --data DATA --train-only
    python bench/repair.py                                # the page from the results that are there

DATA is a folder with the data sets reasoning_gym, cl_benchmark and facts_countries. Fine-tunes and answers are kept
under bench/out/repair, so that the same command goes on after a stop; numbers are in bench/results/repair, one file for
each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budget_runs import halves
from retention_runs import FAMILIES, write

from retain.advice.repair_page import moves_table

ROOT = Path(__file__).parent.parent
RESULTS, WORK, PAGE = (
    ROOT / "bench" / "results" / "repair",
    ROOT / "bench" / "out" / "repair",
    ROOT / "docs" / "repair.md",
)
BEGIN, END = "<!-- numbers, by bench/repair.py -->", "<!-- end of numbers -->"
#: What is answered in words, which is what naive training loses (docs/log.md): suites, and questions of budget_runs.py.
SUITES, ASKED = ("core/elements", "core/instructions"), ("capitals", "continents", "sums")


@dataclass(frozen=True)
class Study:
    """A naive fine-tune.

    Args:
        about: in words, for the page.
        methods: as in a configuration.
        data: its folder, under DATA.
        only: rows that are learned.
        train: settings of the training.
    """

    about: str
    methods: list[Any]
    data: str
    only: dict[str, list[str]] | None
    train: dict[str, Any]


STUDIES = {
    "full": Study(
        "full fine-tuning on puzzles (reasoning_gym), learning rate 1e-4",
        ["none"], "reasoning_gym", {"task": list(FAMILIES)},
        {"learning_rate": 1e-4, "max_steps": 60, "max_length": 192},
    ),
    "full-high": Study(
        "the same at three times that rate, 3e-4",
        ["none"], "reasoning_gym", {"task": list(FAMILIES)},
        {"learning_rate": 3e-4, "max_steps": 60, "max_length": 192},
    ),
    "lora": Study(
        "LoRA (r = 16) on the same puzzles, learning rate 1e-3",
        [{"lora": {"r": 16}}], "reasoning_gym", {"task": list(FAMILIES)},
        {"learning_rate": 1e-3, "max_steps": 60, "max_length": 192},
    ),
    "lora-mnli": Study(
        "LoRA (r = 16) on another domain, natural language inference (MNLI), learning rate 1e-3",
        [{"lora": {"r": 16}}], "cl_benchmark/mnli", None,
        {"learning_rate": 1e-3, "max_steps": 60, "max_length": 192},
    ),
}  # fmt: skip


def trained(name: str, data: Path, work: Path, model: str, train: dict[str, Any]) -> Path:
    """The run directory of a fine-tune, trained unless it is there; its own probes are only what a run must have."""
    from retain.config import parse
    from retain.pipeline import run

    study = STUDIES[name]
    task: dict[str, Any] = {"name": name, "data": str(data / study.data), "test_limit": 2}
    values = {
        "name": name, "model": model, "methods": study.methods,
        "tasks": [task | ({"only": study.only} if study.only else {})],
        "probes": {"reference": [str(few(work))]},
        "train": {"per_device_train_batch_size": 8, "num_train_epochs": 4, "save_strategy": "no"} | study.train | train,
        "output": str(work / "runs" / name),
    }  # fmt: skip
    run(parse(values, name), lambda line: None)
    return work / "runs" / name


def few(work: Path) -> Path:
    """Two items, so that the run itself asks next to nothing."""
    rows = [{"prompt": f"The sky is{dot}", "choices": [" blue", " green"], "answer": 0} for dot in ("", " always")]
    path = work / "few.jsonl"
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(name: str, data: Path, work: Path, items: int) -> Path:
    """Test rows of a fine-tune's task, as a file for --learned. Only the exact answer counts: who talks hits many."""
    study = STUDIES[name]
    lines = (data / study.data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if study.only is None or row["task"] in study.only["task"]]
    rows = list({row["prompt"]: row for row in rows}.values())  # some are in the data twice
    step = max(1, len(rows) // items)
    chosen = [
        {"kind": "answer", "prompt": row["prompt"], "answers": [row["response"]], "score": "exact"}
        for row in rows[::step][:items]
    ]
    path = work / f"{name}-learned.jsonl"
    write(path, "".join(json.dumps(row) + "\n" for row in chosen))
    return path


def kept(data: Path, work: Path, items: int) -> list[str]:
    """Probes of what must be kept, for `retain repair --keep`: suites, and files of questions on real facts."""
    rows = [row for half in halves(data).values() for row in half]
    found = []
    for probe in ASKED:
        mine = [row | {"probe": probe} for row in rows if row["probe"].startswith(f"{probe}_")]
        found.append(str(work / f"{probe}.jsonl"))
        write(work / f"{probe}.jsonl", "".join(json.dumps(row) + "\n" for row in mine[:items]))
    return [*SUITES, *found]


def repaired(name: str, tuned: Path, learned: Path, given: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Repair one and keep its numbers."""
    from retain.cli.repair import carry_out

    folder = given.work / "repairs" / name
    keep = kept(given.data, given.work, given.items)
    carry_out(
        given.model, str(tuned), str(learned), keep, folder, limit=given.items, search=given.search,
        train_steps=given.train_steps, say=say,
    )  # fmt: skip
    found = json.loads((folder / "repair.json").read_text(encoding="utf-8"))
    found |= {"tuned": name, "folder": ""}  # places on this machine say nothing
    write(given.results / f"{name}.json", json.dumps(found, indent=1) + "\n")
    for form in ("model", "adapter"):  # its numbers are what is wanted
        shutil.rmtree(folder / form, ignore_errors=True)


def text(results: Path) -> str:
    """The part of the page with the numbers."""
    from retain.advice.repair import Repair

    parts = []
    for name, study in STUDIES.items():
        path = results / f"{name}.json"
        if not path.is_file():
            parts.append(f"### `{name}`: {study.about}\n\nNot measured yet.")
            continue
        found = Repair.model_validate_json(path.read_text(encoding="utf-8"))
        parts.append(f"### `{name}`: {study.about}\n\n{moves_table(found)}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets; without it nothing is run")
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--items", type=int, default=120, help="at most, per probe")
    parser.add_argument("--learned-items", type=int, default=160)
    parser.add_argument("--search", type=int, default=6, help="points of the search over groups")
    parser.add_argument("--train-steps", type=int, default=12, help="of self-distillation")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--train", type=json.loads, default={}, help="training settings over the bench's, as JSON")
    given = parser.parse_args(arguments)

    from rich.console import Console

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    say = Console(stderr=True, highlight=False, markup=False).print
    for name in given.only if given.data else ():
        say(f"{name}: training, unless it is there")
        tuned = trained(name, given.data, given.work, given.model, given.train)
        if given.train_only:
            continue
        learned = questions(name, given.data, given.work, given.learned_items)
        repaired(name, tuned, learned, given, say)
        fill(given.page, given.results)
    fill(given.page, given.results)
    print(f"{given.page}: written.")
    return 0


def fill(path: Path, results: Path) -> None:
    """Write the numbers that are there into the page."""
    page = path.read_text(encoding="utf-8")
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    write(path, f"{head}\n\n{text(results)}\n\n{tail}")


if __name__ == "__main__":
    sys.exit(main())
