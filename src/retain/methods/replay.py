"""Replay — mixes rows that stand for old abilities into every batch of new ones.

    batch = (1 − ρ(t)) new rows + ρ(t) old rows          (Rolnick et al. 2018, arXiv:1811.11682)

ρ = fraction, counted in rows or supervised tokens and followed at every step; t = progress through the task.
Old rows are those of earlier tasks (a reservoir on disk) and, for what the model could do before: rows the user
gives as `old`, otherwise conversations that the model writes with itself before training starts (Magpie header,
arXiv:2406.08464; self-written replay, arXiv:2602.20162). `source: demonstrations` writes rows like a few that are
given: inputs in context, answers by the latest model, k-means for diversity (SSR, arXiv:2403.01244). `on_policy` lets
the latest model answer old prompts before each task and keeps what a check finds right (OPR, arXiv:2605.29495). What
was written, and by which weights, is in the run's `buffer` folder. With a `priority`, the row of each place is drawn
late, with P(i) ∝ (u_i + floor)^exponent (Schaul et al. 2015, arXiv:1511.05952), u = what the row is worth, measured
again while training: a measurement decides from the next one on, so that rows read ahead are the same whoever reads.
Deviations from the paper: the share is held by counting, not by chance; rows are drawn without repetition within
    a pass over the buffer. A step holds ρ of the batch size, so the same new rows take 1/(1 − ρ) as many steps.
    Inputs from demonstrations are written once and rows of all kinds are chosen after they were answered; on policy
    the first answer is greedy. Rows drawn by priority are spread evenly over a step (systematic sampling) instead of
    independently.
Needs: old rows at every step: the user's, or written by the model.
Cost: ρ of a step; writing about one second per two rows on two CPU cores, once, or before each task with `refresh`.
    A `priority` by loss: a forward pass over all replay rows before the task, over `measure_rows` of them every
    `measure_every` steps, and over the rows kept after it (`forgetting`, `custom`); `gradient`: a forward and backward
    pass for each row instead. `length` and `terms`: nothing. `policy: priority` measures all of the task's rows once
    (not for `forgetting`).
Combine with: everything; with `distill` the term applies to the replayed rows.   Conflicts: none.
Tune: `fraction` 0.01–0.05 for general data, 0.1–0.25 in short runs or when little may be lost. `priority:
    forgetting` where the buffer holds much more than is replayed; `exponent` 0.4–0.8.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from retain.data.buffer import Buffer
from retain.data.mixture import Mixture
from retain.errors import ConfigError
from retain.functional.sampling import schedule
from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.prioritised import Prioritised
from retain.methods.writing import Demonstrations, OnPolicy, Server, Writing


class Replay(Prioritised, Method):
    """Experience replay, with self-written rows when old data are gone."""

    name = "replay"
    family = "replay"
    paper = "arXiv:1811.11682"
    off = {"fraction": 0.0}

    class Config(Prioritised.Config):
        fraction: float = Field(0.1, ge=0, lt=1)
        """Share of replay in what is trained on; 0 is off. The start of a schedule that is not constant."""
        schedule: Literal["constant", "linear", "cosine", "rising", "custom"] = "constant"
        """How the share moves over the task; all but constant end at `end`."""
        end: float | None = Field(None, ge=0, lt=1)
        """Share at the end of a linear, cosine or rising schedule."""
        expression: str | None = None
        """For `custom`: the share as an expression of t in [0, 1], e.g. `0.3 * (1 - t)`."""
        by: Literal["rows", "tokens"] = "rows"
        """Count the share in rows or in supervised tokens."""
        source: Literal["auto", "old", "self", "demonstrations", "on_policy", "none"] = "auto"
        """Rows for abilities from before: the given old rows, self-written ones, whichever is there, rows written like
        the given ones, given prompts and those of earlier tasks answered anew, or none."""
        rows: int = Field(256, ge=1)
        """Most such rows that are taken; of self-written ones no more than one pass over the first task needs."""
        max_tokens: int = Field(64, ge=8)
        """Longest answer in a row the model writes; long rows weigh more, since the loss counts tokens."""
        buffer: int = Field(10_000, ge=0)
        """Rows of earlier tasks kept on disk; 0 keeps none."""
        demonstrations: Demonstrations = Demonstrations()
        """For `source: demonstrations`."""
        on_policy: OnPolicy = OnPolicy()
        """For `source: on_policy`."""
        refresh: bool = True
        """For both: the model answers anew before every task; false keeps its first answers."""
        endpoint: Server | None = None
        """An OpenAI-compatible server that writes in place of the model in training (not for `source: auto`)."""

        @field_validator("demonstrations", "on_policy", "refresh", "endpoint")
        @classmethod
        def _has_effect(cls, value: Any, info: ValidationInfo) -> Any:
            source, name = info.data.get("source"), str(info.field_name)
            allowed = {"refresh": ["demonstrations", "on_policy"]}.get(name, [name])
            if name == "endpoint":
                allowed = ["self", "demonstrations", "on_policy"]
            if source not in allowed and value != cls.model_fields[name].get_default():
                raise ValueError(f"without effect at source: {source}; it belongs to source: {' or '.join(allowed)}")
            return value

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old"} if self.config.source in ("old", "demonstrations") else ())

    def keeps_text(self, old: bool) -> str | None:
        if self.config.source in ("demonstrations", "on_policy"):
            return f"source {self.config.source} writes given text; set `source: self`"
        return "keeps rows of tasks; set `buffer: 0`" if self.config.buffer else None

    def prepare_data(self, data: Mixture, run: Run) -> Mixture:
        c = self.config
        self.check_priorities(data)
        parts: list[Any] = []
        given = run.old if c.source != "self" else None
        # twice what one pass needs: variety protects, and fewer are written faster
        needed = math.ceil(len(data.new) * c.fraction / (1 - c.fraction)) if hasattr(data.new, "__len__") else c.rows
        number = min(c.rows, max(16, 2 * needed))
        writing = functools.partial(Writing, run, c.max_tokens, c.refresh, c.endpoint)
        if c.source == "demonstrations":
            parts.append(writing().from_demonstrations(given, number, c.demonstrations))
        elif c.source == "on_policy":
            parts += [given.select(range(min(number, len(given))))] if given is not None else []
        elif c.endpoint is not None:
            parts.append(writing().freely(number))
        elif c.source != "none":
            number = c.rows if given is not None else number
            parts.append(run.old_rows(run.model, number, given=given, max_tokens=c.max_tokens))
        earlier = self._buffer(run)
        if earlier is not None and len(earlier):
            rows = earlier.rows()
            # three quarters of the replay stand for abilities from before: task rows must not drown them
            most = number if c.source == "on_policy" else len(rows)  # an answer costs more than a row of a file
            room = -(-len(parts[0]) // 3) if parts else most
            parts.append(rows.shuffle(seed=run.seed + run.task_index).select(range(min(room, len(rows)))))
        if c.source == "on_policy" and any(map(len, parts)):
            parts = [writing().on_policy(parts, c.on_policy)]
        rows = joined([run.tokenise(part) for part in parts if len(part)])
        if rows is None or len(rows) == 0:
            if run.task_index == 1 and c.source in ("none", "on_policy"):
                run.say(f"replay: nothing to replay during the first task (source: {c.source}).")
                return data
            found = sum(len(part) for part in parts)
            if found:
                raise ConfigError(
                    f"methods.replay: of {found} replay rows none has an answer within `train.max_length`. "
                    "Raise it, or give shorter rows."
                )
            raise ConfigError("methods.replay: the buffer is empty. Set `source: self`, or give `old:` rows.")
        share = schedule(c.schedule, None if c.schedule == "custom" else c.fraction, c.end, c.expression)
        run.say(f"replay: {len(rows)} rows to replay, share {share(0.0):.0%} of {c.by} at the start.")
        return self.prioritised(Mixture(data.new, rows, share, c.by), run)

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if self.config.buffer and run.new_rows is not None:
            self.store(run)

    def _buffer(self, run: Run) -> Buffer | None:
        if not self.config.buffer:
            return None
        # a run killed after this task filled the buffer must replay what it replayed before
        return self.buffer_of(run).before(run.task)


def joined(parts: list[Any]) -> Any | None:
    """One data set of tokenised parts, with the columns they share."""
    from datasets import concatenate_datasets

    if not parts:
        return None
    common = [c for c in parts[0].column_names if all(c in p.column_names for p in parts)]
    return concatenate_datasets([p.select_columns(common) for p in parts])
