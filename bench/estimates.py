"""What `retain plan` says against what a run then takes: memory and time, part by part. Prints a Markdown table.

    python bench/estimates.py                      # all cases on the starter model
    python bench/estimates.py --only lora full     # some of them
    python bench/estimates.py --threads 1          # one thread, timed in processor time: also right on a busy machine

Every estimate and every run has a process of its own. Peak memory is the largest resident size of the run's process.
Ends with exit code 1 when the memory or the time of learning is off by more than a factor of 1.5. Results:
bench/out/estimates.json. The shares in `retain.estimate.EFFICIENCY` come from here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALLOWED = 1.5
RECIPE = [{"lora": {}}, {"replay": {"fraction": 0.3, "max_tokens": 48}}, {"distill": {"strength": 2.0}}]
#: Case → methods, settings of the training, orders of the demo in one row.
CASES: dict[str, tuple[list[Any], dict[str, Any], int]] = {
    "lora": ([{"lora": {}}], {}, 3),
    "full": (["none"], {}, 3),
    "lora, long rows": ([{"lora": {}}], {"per_device_train_batch_size": 4}, 12),
    "full, small batch": (["none"], {"per_device_train_batch_size": 2}, 1),
    "full, float32": (["none"], {"bf16": False}, 3),
    "full, checkpointing": (["none"], {"gradient_checkpointing": True}, 6),
    "recipe": (RECIPE, {}, 1),
    "ewc": ([{"lora": {}}, {"ewc": {"samples": 32}}, {"replay": {"rows": 32, "max_tokens": 48}}], {}, 1),
}
#: First word of a part of the estimated time → what is timed in the run.
PARTS = ("learning", "writing", "importance", "asking")


def configuration(case: str, model: str, steps: int, folder: Path) -> Any:
    """The configuration of a case; its rows are written into a folder."""
    from retain.config import parse
    from retain.data import demo_tasks

    methods, train, together = CASES[case]
    number = steps * train.get("per_device_train_batch_size", 8)
    for split, count in (("train", number), ("test", 8)):
        single = demo_tasks.rows("orders", count * together, 1)[0]
        parts = [single[i : i + together] for i in range(0, len(single), together)]
        joined = [{key: "\n".join(one[key] for one in part) for key in ("prompt", "response")} for part in parts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in joined), encoding="utf-8")
    values = {"model": model, "tasks": [{"data": str(folder), "name": "orders"}], "methods": methods}
    values |= {"train": {"max_steps": steps, **train}, "probes": {"limit": 8}, "output": str(folder / "run")}
    return parse(values)


def estimated(config: Any) -> dict[str, float]:
    """What the estimate says: bytes, and seconds by part."""
    from retain.estimate import estimate
    from retain.inputs import load_probes, load_tasks
    from retain.models.load import load_tokenizer
    from retain.pipeline import plan

    planned = plan(config)
    tokenizer = load_tokenizer(config.model.name)
    tasks = load_tasks(config, tokenizer, planned.train["max_length"], lambda line: None)
    probes, _, _ = load_probes(config, tasks, tokenizer, lambda line: None)
    found = estimate(planned, tasks, tokenizer, probes)
    print(json.dumps(found.memory), file=sys.stderr)
    times = {part: sum(s for name, s in found.time.items() if name.startswith(part)) for part in PARTS}
    return {"memory": found.bytes, **{part: seconds for part, seconds in times.items() if seconds}}


def measured(config: Any, clock: Callable[[], float]) -> dict[str, float]:
    """What a run takes: peak bytes, and seconds by part."""
    from retain.methods import context, ewc
    from retain.pipeline import run
    from retain.probes import asking
    from retain.training import watch

    seconds: dict[str, float] = defaultdict(float)

    def timed(module: Any, name: str, part: str) -> None:
        inner = getattr(module, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = inner(*args, **kwargs)
            seconds[part] += clock() - start
            return result

        setattr(module, name, outer)

    class Steps(watch.Record):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds["learning"] += clock() - self.start

    timed(context, "write_own", "writing")
    timed(ewc.EWC, "importance", "importance")
    timed(asking, "ask", "asking")
    watch.Record = Steps  # type: ignore[misc]
    run(config, lambda line: None)
    return {"memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, **seconds}


def child(case: str, kind: str, model: str, steps: int, threads: int | None) -> None:
    """One estimate, or one run; its numbers go to standard output."""
    import torch

    from retain.cli.common import quiet_libraries

    quiet_libraries()
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(case, model, steps, Path(folder))
        clock = time.process_time if threads == 1 else time.perf_counter
        print(json.dumps(estimated(config) if kind == "estimate" else measured(config, clock)))


def compared(case: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a case: part, estimated, measured, ratio."""
    both = []
    for kind in ("estimate", "run"):
        words = [case, kind, given.model, str(given.steps), str(given.threads or 0)]
        threads = {"OMP_NUM_THREADS": str(given.threads)} if given.threads else {}
        done = subprocess.run(
            [sys.executable, __file__, "--child", *words], stdout=subprocess.PIPE, text=True, env=os.environ | threads
        )
        if done.returncode:
            raise SystemExit(f"{case}, {kind}: failed")
        both.append(json.loads(done.stdout.splitlines()[-1]))
    said, took = both
    return [
        {"case": case, "part": part, "estimated": said[part], "measured": took[part], "ratio": said[part] / took[part]}
        for part in said
        if took.get(part)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| case | part | estimated | measured | estimated / measured |", "|---|---|---|---|---|"]
    for row in rows:
        size, unit = (2**30, "GiB") if row["part"] == "memory" else (1, "s")
        numbers = " | ".join(f"{row[key] / size:.1f} {unit}" for key in ("estimated", "measured"))
        lines.append(f"| {row['case']} | {row['part']} | {numbers} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--model", default="starter", help="starter, or a folder")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a run")
    parser.add_argument("--threads", type=int, help="of PyTorch; with 1, processor time is measured")
    parser.add_argument("--out", type=Path, default=Path("bench/out/estimates.json"))
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        case, kind, model, steps, threads = given.child
        child(case, kind, model, int(steps), int(threads) or None)
        return 0
    rows: list[dict[str, Any]] = []
    for case in given.only:
        rows += compared(case, given)
        print(table(rows[-len(PARTS) - 1 :] if len(rows) > len(PARTS) else rows), file=sys.stderr)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    off = [row for row in rows if row["part"] in ("memory", "learning")]
    return 0 if all(1 / ALLOWED <= row["ratio"] <= ALLOWED for row in off) else 1


if __name__ == "__main__":
    sys.exit(main())
