"""Rows that are replayed, source by source."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from retain.data import replay_sources as origins
from retain.data.replay_sources import Part, SourceConfig
from retain.methods.context import Run
from retain.methods.writing import Writing


def parts(config: Any, run: Run, number: int, earlier: Callable[[], Any | None]) -> list[Part]:
    """The rows of every source that has any.

    Args:
        config: settings of `replay`.
        run: the task.
        number: rows that the model writes, at most, where a source has no limit of its own.
        earlier: gives rows of earlier tasks, or None.
    """
    c, given = config, run.old
    writing = partial(Writing, run, c.max_tokens, c.refresh, c.endpoint)

    def own(source: SourceConfig) -> Any | None:
        if source.data == "tasks":
            return origins.some(earlier(), source.limit, run.seed)
        if source.data == "old":
            everything = None if given is None else run.old_rows(run.model, len(given), given=given)
            return origins.some(everything, source.limit or c.rows, run.seed)
        if source.data == "demonstrations":
            return writing().from_demonstrations(given, number, c.demonstrations)
        if source.data == "on_policy":
            return given.select(range(min(number, len(given)))) if given is not None else None
        if c.endpoint is not None:
            return writing().freely(source.limit or number)
        return run.old_rows(run.model, source.limit or number, given=None, max_tokens=c.max_tokens)

    if c.sources:
        return origins.gather(c.sources, run.seed, own)
    before = ("self" if given is None else "old") if c.source == "auto" else c.source
    listed = [SourceConfig(data=name) for name in (before, "tasks") if name != "none"]
    found = origins.gather(listed, run.seed, own)
    if found and (before == "on_policy" or c.priority != "none"):  # a draw by worth knows no shares of sources
        most = number if before == "on_policy" else None  # an answer costs more than a row of a file
        room = -(-len(found[0].rows) // 3) if len(found) > 1 else most
        tasks = next((part for part in found if part.name == "tasks"), None)
        if tasks is not None:
            tasks.rows = origins.some(tasks.rows, room, run.seed + run.task_index)
    if found and before == "on_policy":
        return [Part(before, writing().on_policy([part.rows for part in found], c.on_policy))]
    return found
