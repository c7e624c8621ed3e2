"""The demo: one small model learns two jobs, once plainly and once with the default recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain import analysis
from retain.config import DEFAULT_METHODS, RunConfig, parse
from retain.data import demo_tasks
from retain.errors import RunError
from retain.results import Results, load_items, write_text

#: A fact that the base model knows, an explanation, and one new ticket.
QUESTIONS = (
    "What is the capital of France?",
    "Why do people wear coats in winter?",
    "The kettle does not turn on any more. This is urgent!",
)
#: Small batches: as many steps from half the rows, and less padding.
TRAIN: dict[str, Any] = {
    "learning_rate": 1e-3,
    "max_length": 160,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
}
#: Old abilities that show in what the model writes, asked at both ends: half of the time goes into asking.
OLD: tuple[Any, ...] = (
    *("core/arithmetic", "core/countries", "core/elements"),
    {"data": "core/instructions", "max_tokens": 64},
)
ROWS, TEST_ROWS, ITEMS = 48, 32, 32


@dataclass
class Outcome:
    """What the demo found."""

    naive: Results
    retained: Results
    comparison: analysis.Comparison  # on generated answers: what retained lost of what naive lost
    learned_share: float  # retained new-task score / naive new-task score
    report: Path


def configs(
    folder: Path,
    seed: int = 0,
    rows: int = ROWS,
    items: int = ITEMS,
    methods: Sequence[Any] | None = None,
    train: dict[str, Any] | None = None,
) -> dict[str, RunConfig]:
    """The two runs, naive and retained; writes their data into `folder`.

    Raises:
        RunError: the folder holds the data of a demo with another seed or number of rows, which its runs need.
    """
    tasks, files = [], {}
    for name in demo_tasks.NAMES:
        learn, test = demo_tasks.rows(name, rows, TEST_ROWS, seed)
        for split, part in (("train", learn), ("test", test)):
            text = "".join(json.dumps(row) + "\n" for row in part)
            files[folder / "data" / name / f"{split}.jsonl"] = text
        tasks.append({"name": name, "data": str(folder / "data" / name)})
    for path, text in files.items():
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise RunError(
                f"{path}: of a demo with another seed or number of rows. Choose another folder (`--output`), or "
                "delete this one (`retain demo --fresh`)."
            )
    for path, text in files.items():
        write_text(path, text)
    recipe = list(DEFAULT_METHODS if methods is None else methods)
    plain: list[Any] = [e for e in recipe if isinstance(e, dict) and "lora" in e] or ["none"]
    probes = {"reference": list(OLD), "between": "tasks", "limit": items}
    shared = {"tasks": tasks, "seed": seed, "train": TRAIN | (train or {}), "probes": probes}
    return {
        "naive": parse({**shared, "name": "naive", "methods": plain, "output": str(folder / "naive")}),
        "retained": parse({**shared, "name": "retained", "methods": recipe, "output": str(folder / "retained")}),
    }


def compare(naive: Path, retained: Path, results: tuple[Results, Results]) -> tuple[analysis.Comparison, float]:
    """(what was lost on generated answers, share of the naive new-task score that was reached).

    A task's new-task score is taken right after it was learned: what the later task did to it is forgetting.
    """
    first, second = results
    last_a, last_b = first.stages[-1], second.stages[-1]
    written = [p for p in first.probes if p.role == "reference" and p.kind in ("answer", "instruction")]
    base, a, b = (
        load_items(path / "probes" / f"{stage}.parquet")
        for path, stage in ((naive, first.stages[0]), (naive, last_a), (retained, last_b))
    )
    found = analysis.compare_runs(base, a, b, written, confidence=first.confidence)
    learned = [sum(r.matrix[j + 1][j] or 0.0 for j in range(len(r.tasks))) for r in results]
    return found, learned[1] / learned[0] if learned[0] else float("nan")


def answers(folders: dict[str, Path], questions: Sequence[str] = QUESTIONS) -> dict[str, list[str]]:
    """What base, naive and retained answer to the same questions."""
    from retain.models.generation import generate
    from retain.pipeline import load_run
    from retain.rundir import BASE

    first = next(iter(folders.values()))
    models = {"base": load_run(first, BASE), **{name: load_run(folder) for name, folder in folders.items()}}
    chats = [[{"role": "user", "content": q}] for q in questions]
    return {
        name: [a.text.strip() for a in generate(model, tokenizer, chats, 32)]
        for name, (model, tokenizer) in models.items()
    }


def run_demo(folder: Path, say: Callable[[str], None] = print, **settings: Any) -> Outcome:
    """Run both, reuse the baseline, and write one report that shows them side by side."""
    from retain.comparison import run_sets
    from retain.report.page import write_report

    both = configs(folder, **settings)
    results = run_sets(both, say)
    found, share = compare(both["naive"].directory, both["retained"].directory, (results["naive"], results["retained"]))
    report = write_report(both["retained"].directory, [both["naive"].directory])
    return Outcome(results["naive"], results["retained"], found, share, report)


def sentence(found: Outcome) -> str:
    """What the demo showed, in one line with its interval."""
    c = found.comparison
    lost = f"On generated answers the naive run lost {100 * c.lost_a.value:.1f} points"
    kept = f"the retained run {100 * c.lost_b.value:.1f} [{100 * c.lost_b.low:.1f}, {100 * c.lost_b.high:.1f}]"
    share = f", {c.ratio.value:.0%} [{c.ratio.low:.0%}, {c.ratio.high:.0%}] of it" if c.ratio else ""
    return f"{lost}, {kept}{share}; it reached {found.learned_share:.0%} of the naive run's new-task score."
