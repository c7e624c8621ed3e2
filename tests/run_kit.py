"""Whole runs on a tiny model folder: the files they need, and what they leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from tiny import tiny_model, tiny_tokenizer

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven"]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def response_rows(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Prompts with a response; answers differ in length."""
    return [
        {"prompt": f"count {i + offset}", "response": " ".join(NUMBERS[: 1 + (3 * i + offset) % 7])}
        for i in range(count)
    ]


def choice_rows(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Questions with three choices."""
    return [
        {"question": f"which is {i + offset}?", "choices": ["ships", "birds", "hearts"], "answer": (i + offset) % 3}
        for i in range(count)
    ]


def probe_rows() -> list[dict[str, Any]]:
    """A choice probe and a perplexity probe, as a probe file."""
    choices = [
        {"probe": "animals", "prompt": f"Which animal {i}? Answer:", "choices": [" bird", " ship"], "answer": i % 2}
        for i in range(4)
    ]
    return choices + [{"probe": "prose", "text": f"Seven small ships sailed {i} times over the sea."} for i in range(2)]


def tiny_folder(path: Path) -> Path:
    """A model folder with tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def workshop(path: Path) -> Path:
    """A folder with a model, two tasks, a probe file and old rows; paths inside are as `settings` expects."""
    tiny_folder(path / "model")
    write_lines(path / "count" / "train.jsonl", response_rows(24))
    write_lines(path / "count" / "test.jsonl", response_rows(4, 100))
    write_lines(path / "which" / "train.jsonl", choice_rows(18))
    write_lines(path / "which" / "test.jsonl", choice_rows(4, 100))
    write_lines(path / "probes.jsonl", probe_rows())
    write_lines(path / "old.jsonl", response_rows(12, 500))
    return path


def settings(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Configuration values of a short run in a workshop; a change with the value None removes a key."""
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "tasks": [str(folder / "count"), str(folder / "which")],
        "methods": [{"replay": {"fraction": 0.25}}],
        "old": str(folder / "old.jsonl"),
        "probes": {"reference": [str(folder / "probes.jsonl")]},
        "train": {
            "use_cpu": os.environ.get("RETAIN_TESTS_ON") != "gpu",
            "bf16": False,
            "per_device_train_batch_size": 4,
            "max_length": 64,
            "learning_rate": 1e-3,
        },
        "output": str(output),
    }
    values |= changes
    return {key: value for key, value in values.items() if value is not None}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """The values as a YAML file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """Variables of a child process: our packages, one thread, no hub."""
    given = os.environ.get("PYTHONPATH")
    paths = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent), *([given] if given else [])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def carry_out(folder: Path, output: Path, **changes: Any) -> tuple[Any, list[str]]:
    """Run; returns the results and what was said."""
    from retain.config import parse
    from retain.pipeline import run

    said: list[str] = []
    return run(parse(settings(folder, output, **changes)), said.append), said


def in_many_calls(monkeypatch: Any) -> None:
    """Self-written rows are asked for a few at a time, so that there is something between two calls of the model."""
    from retain.data.synthesis import write_rows

    monkeypatch.setitem(write_rows.__kwdefaults__, "batch", 32)
