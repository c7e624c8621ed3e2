"""Rows on this disk for the task files of this folder: $LM_EVAL_DATA/NAME/test.jsonl, or data/NAME/test.jsonl here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def load(rows: str, **others: Any) -> Any:
    """The data set of a task, as the harness asks for it: `rows` is what the task file says under `dataset_kwargs`."""
    from datasets import load_dataset

    folder = Path(os.environ.get("LM_EVAL_DATA") or Path(__file__).parent / "data")
    file = folder / rows / "test.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: set LM_EVAL_DATA to the folder that holds {rows}/test.jsonl")
    return load_dataset("json", data_files={"test": str(file)})


def _of(*fields: str) -> Any:
    """The rows of BLiMP of some fields."""
    return lambda rows: rows.filter(lambda row: row["field"] in fields)


morphology, semantics, syntax = _of("morphology"), _of("semantics"), _of("syntax")
syntax_semantics = _of("syntax_semantics", "syntax/semantics")
