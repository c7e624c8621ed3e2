"""What bench/two_tasks.py runs: a training of two tasks at one setting, and the small file that it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small_world

from retain import methods
from retain.methods.context import Run

STEPS, BATCH, ROWS, OLD = 100, 16, 512, 96
RATE = 1e-3  # with and without an adapter

Setting = dict[str, Any]  # recipe, rate (× the usual one), share (of the steps), knob (as text); settings of a budget


class WatchedRun(Run):
    """Notes whether old rows were asked for; draws no progress bars."""

    asked = False

    def old_rows(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = True
        return super().old_rows(*args, **kwargs)

    def track(self, steps: Any, label: str, total: int) -> Any:
        return iter(steps)


def train(setting: Setting, seed: int, base: Path) -> dict[str, Any]:
    """Learn B, then C. `answers` are those to A, B and C before, in between and after; 'asked' about old rows."""
    from transformers import PrinterCallback
    from trl import SFTConfig

    from retain.models.load import settled
    from retain.training.trainer import ContinualTrainer

    model: Any = small_world.pretrained(seed, base)
    start = time.monotonic()
    old = small_world.chat(small_world.lessons("A", OLD, 10_000 + seed))
    found, asked = [{f: small_world.answers(model, f) for f in small_world.FAMILIES}], False
    with tempfile.TemporaryDirectory() as folder:
        for index, family in enumerate(small_world.FAMILIES[1:], 1):
            made = methods.build(setting["recipe"])  # a task begins with fresh methods, as in `retain run`
            rows = small_world.chat(small_world.lessons(family, ROWS, seed))
            run = WatchedRun(
                *(Path(folder) / family, family, index, seed, small_world.tokenizer(), Path(folder)),
                new_rows=rows,
                say=lambda line: None,
            )
            trainer = ContinualTrainer(
                model,
                SFTConfig(
                    str(run.directory),
                    max_steps=round(STEPS * setting["share"]),
                    per_device_train_batch_size=BATCH,
                    learning_rate=RATE * setting["rate"],
                    lr_scheduler_type="linear",
                    warmup_steps=5,
                    max_length=32,
                    seed=seed + index,
                    save_strategy="no",
                    bf16=False,
                    use_cpu=True,
                    gradient_checkpointing=False,
                    report_to="none",
                    disable_tqdm=True,
                    logging_steps=STEPS,
                ),
                train_dataset=rows,
                processing_class=small_world.tokenizer(),
                methods=made,
                old=old,
                run=run,
                budget=_budget(setting, family, seed),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.release()
            model, asked = settled(trainer.model), asked or run.asked
            found.append({f: small_world.answers(model, f) for f in small_world.FAMILIES})
    return {"answers": found, "asked": asked, "seconds": round(time.monotonic() - start, 1)}


def _budget(setting: Setting, family: str, seed: int) -> Any:
    """What `strength: auto` follows, where a setting has a budget: all that this task could overwrite is asked about,
    and lessons of it are the anchors. No last step is taken."""
    if "budget" not in setting:
        return None
    from retain.probes.suite import probes_from_rows
    from retain.training.budget import ForgettingBudget

    before = small_world.FAMILIES[: small_world.FAMILIES.index(family)]
    exams = [[{"prompt": q, "answers": [a], "max_tokens": 4} for q, a in small_world.exam(f)] for f in before]
    probes = [probe for f, rows in zip(before, exams) for probe in probes_from_rows(rows, f, score="exact")]
    coder = small_world.tokenizer()
    lessons = [row for f in before for row in small_world.lessons(f, 64, 20_000 + seed)]
    texts = [
        coder.apply_chat_template([{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenize=False)
        for q, a in lessons
    ]
    return ForgettingBudget(on=probes, anchors=texts, settle=False, say=lambda line: None, **setting["budget"])


class Store:
    """One file per (method, setting, seed); what is there is not measured again, unless its method is in `fresh`."""

    def __init__(self, folder: Path, deadline: float = float("inf"), fresh: Sequence[str] = ()) -> None:
        self.folder, self.deadline, self.fresh = folder, deadline, set(fresh)
        self.trained: set[Path] = set()

    def path(self, name: str, setting: Setting, seed: int) -> Path:
        facts = [small_world.VERSION, STEPS, BATCH, ROWS, OLD, RATE, setting]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        return self.folder / name / f"{key}-seed{seed}.json"

    def get(self, name: str, setting: Setting, seed: int) -> dict[str, Any]:
        """The result, measured now or before.

        Raises:
            OutOfTime: the budget is spent.
        """
        path = self.path(name, setting, seed)
        if path.is_file() and (name not in self.fresh or path in self.trained):
            return json.loads(path.read_text())
        if time.monotonic() > self.deadline:
            raise OutOfTime
        result = {"method": name, **setting, "seed": seed, **train(setting, seed, self.folder / "base")}
        self.trained.add(path)
        write(path, json.dumps(result) + "\n")
        return result


class OutOfTime(Exception):
    """The budget of this call is spent; everything measured so far is kept."""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
