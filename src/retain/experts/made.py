"""An expert out of a finished run: its adapter, and what its card says of data, probes, forgetting and training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from retain.config import RunConfig
from retain.errors import DataError, RetainError, RunError
from retain.experts.card import Forgetting, Learned, Measured
from retain.results import Results, load_results
from retain.rundir import RunDirectory, stage_name

Say = Callable[[str], None]
EXAMPLES = 32  # questions that a card keeps, by default
_LONGEST = 500  # characters of a question


def of_run(directory: str | Path, examples: int = EXAMPLES, say: Say = print) -> tuple[Path, str, dict[str, Any]]:
    """(folder of the adapter, its base, fields of the card) of a run that learned one task with `lora`.

    Args:
        examples: at most so many questions of the training rows are put on the card; none of a private run.
        say: receives what there is to know about them.

    Raises:
        RunError: no finished run, or one that left no adapter of the base alone.
    """
    place = RunDirectory(directory)
    config = place.read_config()
    if len(config.tasks) != 1:
        raise RunError(
            f"{directory}: this run learned {len(config.tasks)} tasks one after the other, so its later adapters stand "
            "on the earlier ones. Train each as an expert of its own: `retain experts train NAME --data …`."
        )
    stage = stage_name(1, config.task_names[0])
    summary = place.done(stage)
    if summary is None:
        raise RunError(f"{directory}: not finished. Run `retain run {place.config}` again to go on.")
    if summary["kind"] != "adapter":
        raise RunError(
            f"{directory}: it left {summary['kind']}, and an expert is an adapter alone. Train with `lora`, without "
            "methods that change the model otherwise."
        )
    from retain.models.load import resolve

    if (Path(resolve(config.model.name)) / "adapter_config.json").is_file():
        raise RunError(
            f"{directory}: its base '{config.model.name}' is an adapter itself. Write that as a model first (`retain "
            "export`), and train on it."
        )
    results = load_results(place.path)
    fields: dict[str, Any] = {
        "data": Learned(
            source=config.tasks[0].data,
            rows=summary["new_rows"],
            test_rows=max((info.items for info in results.probes if info.task), default=0),
            digest=_digest(place, config),
        ),
        "probes": measured(results),
        "forgetting": forgetting(results),
        "training": _training(place, config, results, summary),
        "examples": _examples(config, examples, say),
    }
    return place.task(stage) / "adapter", config.model.name, fields


def measured(results: Results) -> list[Measured]:
    """What the probes of a run say, the base against its last stage."""
    infos = {info.name: info for info in results.probes}
    return [
        Measured(
            probe=change.probe,
            role=infos[change.probe].role,
            metric=infos[change.probe].metric,
            before=change.before.value,
            after=change.after.value,
            difference=change.difference,
            conclusion=change.conclusion,
        )
        for change in results.changes
    ]


def forgetting(results: Results) -> Forgetting | None:
    """The verdict of a run in short; None where nothing old was measured."""
    verdict = results.verdict
    if verdict is None:
        return None
    return Forgetting(
        value=verdict.forgetting, kept=verdict.difference, learned=verdict.learned, sentence=verdict.sentence
    )


def questions(rows: Iterable[Any], count: int, seed: int = 0) -> list[str]:
    """A sample of the questions of rows, each once and no longer than 500 characters.

    Args:
        rows: in a form of `retain.data.chat.to_chat`, of known length or a stream, whose first ones are then taken.
        count: at most so many.
    """
    found: dict[str, str] = {}
    for row in _in_some_order(rows, seed):
        if len(found) >= count:
            break
        text = " ".join(_question(row).split())[:_LONGEST]
        if text:
            found.setdefault(text.casefold(), text)
    return list(found.values())


def questions_of(where: str | Path, count: int) -> list[str]:
    """The first questions of a file: a question per line of a `.txt`, otherwise rows as a task has them.

    Raises:
        DataError: it cannot be read, or has none.
    """
    path = Path(where)
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Give UTF-8 text, a question per line.") from error
        found = list(dict.fromkeys(" ".join(line.split())[:_LONGEST] for line in lines if line.strip()))[:count]
    else:
        from retain.data.tasks import load_task

        found = questions(load_task(where, hold_out=0, list_choices=False).rows, count)
    if not found:
        raise DataError(f"{path}: no question in it. Give at least one.")
    return found


def _in_some_order(rows: Any, seed: int) -> Iterable[Any]:
    if not hasattr(rows, "__len__"):
        return rows
    return (rows[int(i)] for i in np.random.default_rng(seed).permutation(len(rows)))


def _question(row: dict[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    asked = row["prompt"] if "prompt" in row else row["messages"]
    if isinstance(asked, str):
        return asked
    said = [turn["content"] for turn in asked if turn["role"] == "user"]
    return str(said[0]) if said else ""


def _examples(config: RunConfig, count: int, say: Say) -> list[str]:
    if count < 1:
        return []
    if config.private:
        say("examples: the run is private, so none of its rows is kept. Give some with --examples-from.")
        return []
    from retain.data.tasks import load_task

    spec = config.tasks[0].model_dump(exclude_none=True) | {"long": "cut", "list_choices": False}
    try:
        return questions(load_task(spec, seed=config.seed).rows, count, config.seed)
    except RetainError as error:
        say(f"examples: none, as the rows of the run cannot be read any more ({error}). Give some: --examples-from.")
        return []


def _digest(place: RunDirectory, config: RunConfig) -> str:
    try:
        found = json.loads(place.data.read_text(encoding="utf-8"))[f"tasks.{config.task_names[0]}"]
        return str(found["training rows"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _training(place: RunDirectory, config: RunConfig, results: Results, summary: dict[str, Any]) -> dict[str, Any]:
    try:
        versions = json.loads((place.path / "env.json").read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, LookupError, TypeError):
        versions = {}
    return {
        "run": str(place.path),
        "methods": results.methods,
        "train": config.train,
        "model": config.model.model_dump(mode="json"),
        "seed": config.seed,
        "old": results.old,
        **{key: summary[key] for key in ("steps", "new_rows", "replay_rows", "seconds", "final_loss")},
        "versions": versions,
    }
