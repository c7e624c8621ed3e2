"""Task files of lm-evaluation-harness on rows in the same folder: one of each output type, and a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from run_kit import NUMBERS, write_lines

PLACES = ["France", "Italy", "the north", "the sea", "the ship", "seven birds"]
CHOICES = ["Paris", "Rome and all of its ships", "the cold northern sea"]
ANSWERS = [0, 1, 1, 2, 0, 2, 1, 0, 2]  # whichever choice a model likes, it is right of some rows


def _mean(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def rows(count: int = 9) -> list[dict[str, Any]]:
    """Rows that suit every task; texts differ in length, choices too, the last text is longer than a tiny context."""
    return [
        {
            "question": f"What is the capital of {PLACES[i % 6]} {i}?",
            "choices": [CHOICES[(i + k) % 3] for k in range(3)],
            "answer": ANSWERS[i % 9],
            "text": f"Seven ships sailed {i} times. " * (1 + i % 4)
            + "The heart pumps blood. " * (70 * (i == count - 1)),
            "good": f"The bird sailed {i} times." + " Seven small ships sailed over the cold northern sea." * (i % 2),
            "bad": f"The birds sails {i} times.",
            "target": NUMBERS[i % 7],
        }
        for i in range(count)
    ]


def tasks(lines: Path) -> dict[str, dict[str, Any]]:
    """Settings of every task, by name."""
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(lines)}}, "test_split": "test"}
    question = {"doc_to_text": "Question: {{question}}\nAnswer:"}
    return {
        "tiny_choice": common
        | question
        | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        | {"metric_list": _mean("acc", "acc_norm", "acc_bytes", "acc_mutual_info")},
        "tiny_shots": common
        | question
        | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        | {"num_fewshot": 2, "fewshot_split": "test", "metric_list": _mean("acc")},
        "tiny_pair": common
        | {"output_type": "multiple_choice", "doc_to_text": "", "doc_to_choice": "{{[good, bad]}}", "doc_to_target": 0}
        | {"metric_list": _mean("acc")},
        "tiny_written": common
        | question
        | {"output_type": "generate_until", "doc_to_target": "target"}
        | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 6}}
        | {"metric_list": _mean("exact_match")},
        "tiny_ending": common
        | {"output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{target}}"}
        | {
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                *_mean("acc"),
            ]
        },
        "tiny_text": common
        | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        | {
            "metric_list": [
                {"metric": name, "aggregation": "weighted_perplexity", "higher_is_better": False}
                for name in ("word_perplexity", "byte_perplexity")
            ]
        },
    }


def write_tasks(folder: Path) -> Path:
    """The folder with all task files, a group of two of them and a part that is no task."""
    lines = write_lines(folder / "rows.jsonl", rows())
    for name, settings in tasks(lines).items():
        write_task(folder / f"{name}.yaml", {"task": name} | settings)
    write_task(folder / "tiny_group.yaml", {"group": "tiny_group", "task": ["tiny_choice", "tiny_pair"]})
    write_task(folder / "part.yaml", {"test_split": "test"})
    return folder


def answer_some(folder: Path, model: Any, tokenizer: Any) -> None:
    """Make what the model writes the right answer of every other row, so that some are right and some are wrong."""
    found = alone(model, tokenizer, folder, "tiny_written")["samples"]["tiny_written"]
    changed = rows()
    for sample in found[::2]:
        changed[sample["doc_id"]]["target"] = sample["filtered_resps"][0]
    write_lines(folder / "rows.jsonl", changed)


def write_task(path: Path, settings: dict[str, Any]) -> Path:
    """A task file."""
    path.write_text(yaml.safe_dump(settings | {"metadata": {"version": 1}}, sort_keys=False), encoding="utf-8")
    return path


def alone(model: Any, tokenizer: Any, folder: Path, name: str, limit: int | None = None, **settings: Any) -> Any:
    """What the harness makes of a task without retain; `settings` are those of its model class."""
    import logging

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 3} | settings)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=harness, tasks=[name], limit=limit, task_manager=manager, bootstrap_iters=0)


def write_example_rows(folder: Path, count: int = 6) -> None:
    """Made-up rows where the task files of `examples/lm_eval` look for them."""
    for name in ("arc_easy", "hellaswag", "piqa"):
        keys = ("question", "choices", "answer")
        write_lines(folder / name / "test.jsonl", [{key: row[key] for key in keys} for row in rows(count)])
    fields = ("morphology", "semantics", "syntax", "syntax_semantics", "syntax/semantics")
    pairs = [{"good": r["good"], "bad": r["bad"], "field": field} for field in fields for r in rows(count)]
    write_lines(folder / "blimp" / "test.jsonl", pairs)
