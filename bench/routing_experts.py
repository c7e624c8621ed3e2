"""Small experts for the six domains, for the router that needs them: trained once, kept with what they score."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from routing_questions import ARITHMETIC, SETS

from retain.experts.library import ExpertLibrary
from retain.experts.routing.likelihood import Scorer

RANK = 8
BATCH = 8


def trained(data: Path, model: str, steps: int, folder: Path, say: Callable[[str], None]) -> ExpertLibrary:
    """A library with an expert per domain. Questions are learned with the answers: this router goes by questions.

    Args:
        data: as for `routing_questions.read`; the experts learn from the training rows, but for a few held out.
        model: the base.
        steps: of `BATCH` rows per expert.
        folder: experts that are there are not trained again, so it belongs to one model and number of steps.
    """
    from retain.config import parse
    from retain.pipeline import run

    library = ExpertLibrary(folder / "library")
    for name, where in SETS.items():
        if name in library:
            continue
        start = time.perf_counter()
        task: dict[str, Any] = {"data": str(data / where / "train.jsonl"), "name": name, "on": "all"}
        if name == "arithmetic":
            task["only"] = {"task": sorted(ARITHMETIC)}
        config = {
            "model": model,
            "tasks": [task],
            "methods": [{"lora": {"r": RANK}}],
            "probes": {"reference": [], "task_limit": 2},  # a run must measure something
            "train": {
                "max_steps": steps,
                "per_device_train_batch_size": BATCH,
                "max_length": 192,
                "learning_rate": 5e-4,
                "save_strategy": "no",
            },
            "output": str(folder / name),
        }
        run(parse(config), lambda line: None)
        library.add(name, folder / name / "tasks" / f"01-{name}" / "adapter", base=model)
        say(f"expert {name}: {steps} steps in {time.perf_counter() - start:.0f} s")
    return library


class Scores:
    """What a scorer says of texts, asked once and kept on disk: a measuring that was stopped goes on.

    Args:
        live: asked about texts that are not known.
        file: JSON, expert → text → [log-likelihood, tokens].
    """

    def __init__(self, live: Scorer, file: Path, say: Callable[[str], None]) -> None:
        self.live, self.file, self.say = live, file, say
        self.known: dict[str, dict[str, list[float]]] = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        )

    def __call__(self, name: str | None, texts: Sequence[str]) -> NDArray[np.float64]:
        known = self.known.setdefault(name or "", {})
        new = list(dict.fromkeys(text for text in texts if text not in known))
        if new:
            start = time.perf_counter()
            known.update(zip(new, self.live(name, new).tolist()))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.known, ensure_ascii=False), encoding="utf-8")
            self.say(f"{len(new)} questions under {name or 'the base'}: {time.perf_counter() - start:.0f} s")
        return np.array([known[text] for text in texts], dtype=float)
