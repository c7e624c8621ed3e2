"""Items whose answer changed: the item tables of the first and the last stage, joined item by item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retain.errors import RunError
from retain.report import wording
from retain.report.language import say
from retain.results import ProbeInfo, Results, load_items

#: Outcomes of an item, in the order in which the browser shows them.
OUTCOMES = ("lost", "gained", "worse", "better", "kept", "wrong", "same")
TEXT_LIMIT = 2000  # characters per field; a prompt can be a whole document
TOTAL_LIMIT = 6_000_000  # characters in the page; a phone has to open it


@dataclass(frozen=True)
class Flips:
    """Items for the browser: dictionaries of strings, and how many did not fit."""

    items: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # outcome → items, the left-out ones included
    left_out: int = 0
    others: list[str] = field(default_factory=list)  # names of the compared runs, in the order of "others"

    @property
    def probes(self) -> list[str]:
        """Names of the probes with items here, in the order of first appearance, sorted."""
        return sorted({item["probe"] for item in self.items})


def _table(directory: Path, stage: str) -> dict[tuple[str, str], dict[str, Any]]:
    path = directory / "probes" / f"{stage}.parquet"
    if not path.is_file():
        return {}
    try:
        return {(row["probe"], row["item"]): row for row in load_items(path)}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: not an item table ({error}). Probe this stage again.") from error


def _text(value: str | None) -> str:
    text = value or ""
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"


def _reference(value: str | None) -> str:
    """Several right answers are stored as a JSON list; show them as "a / b"."""
    if value and value.startswith("["):
        try:
            answers = json.loads(value)
        except json.JSONDecodeError:
            return _text(value)
        if isinstance(answers, list) and all(isinstance(answer, (str, int, float)) for answer in answers):
            return _text(" / ".join(map(str, answers)))
    return _text(value)


def outcome(before: dict[str, Any], after: dict[str, Any], higher_is_better: bool = True) -> str:
    """One word of `OUTCOMES` for an item before and after."""
    if before["correct"] is not None and after["correct"] is not None:
        words = {
            (True, False): "lost",
            (False, True): "gained",
            (True, True): "kept",
            (False, False): "wrong",
        }
        return words[bool(before["correct"]), bool(after["correct"])]
    change = (after["score"] or 0.0) - (before["score"] or 0.0)
    if not higher_is_better:
        change = -change
    return "better" if change > 0 else "worse" if change < 0 else "same"


def _answer(row: dict[str, Any], info: ProbeInfo) -> str:
    text = _text(row["output"])
    if row["correct"] is None:
        text = say("items.with_score", text=text, score=wording.score(info, row["score"]))
    return text


def words() -> dict[str, Any]:
    """What the browser of items says."""
    keys = ("empty", "right_answer", "before", "after", "copied")
    found: dict[str, Any] = {key: say(f"items.{key}") for key in keys}
    found["outcome"] = {word: say(f"outcome.{word}") for word in OUTCOMES}
    # The page puts numbers and names into these places itself.
    found["count"] = say("items.count", n="{n}")
    found["count_of"] = say("items.count_of", n="{n}", all="{all}")
    found["after_other"] = say("items.after_other", name="{name}")
    return found


def collect(directory: Path, results: Results, compare: Sequence[tuple[str, Path, Results]] = ()) -> Flips:
    """Items of the first stage against the last one.

    Args:
        directory: the run directory.
        results: its results.
        compare: (label, directory, results) of other runs; their last answer stands beside this run's.

    Items without an answer (perplexity texts) are left out, and so is what exceeds `TOTAL_LIMIT` characters;
    items that changed come first, so these stay.

    Raises:
        RunError: an item table is damaged.
    """
    if len(results.stages) < 2:
        return Flips()
    first, last = _table(directory, results.stages[0]), _table(directory, results.stages[-1])
    others = [(label, _table(place, theirs.stages[-1])) for label, place, theirs in compare if theirs.stages]
    infos = {info.name: info for info in results.probes}
    items: list[dict[str, Any]] = []
    for key, before in first.items():
        after, info = last.get(key), infos.get(key[0])
        if info is None:  # the probe of a task that is still to be learned
            continue
        if after is None or not (before["output"] or after["output"] or before["correct"] is not None):
            continue
        said = any(before[key] for key in ("prompt", "reference", "output"))
        items.append(
            {
                "probe": key[0],
                "item": key[1],
                "outcome": outcome(before, after, info.higher_is_better),
                "prompt": _text(before["prompt"]) if said else say("items.private"),
                "reference": _reference(before["reference"]),
                "before": _answer(before, info),
                "after": _answer(after, info),
                "others": [_answer(table[key], info) if key in table else "" for _, table in others],
            }
        )
    order = {word: place for place, word in enumerate(OUTCOMES)}
    items.sort(key=lambda item: order[item["outcome"]])
    counts = {word: sum(item["outcome"] == word for item in items) for word in OUTCOMES}
    room, fits = TOTAL_LIMIT, 0
    for item in items:
        room -= sum(len(str(value)) for value in item.values())
        if room < 0:
            break
        fits += 1
    counts = {word: count for word, count in counts.items() if count}
    return Flips(items[:fits], counts, len(items) - fits, [label for label, _ in others])
