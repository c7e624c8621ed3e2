"""Replay — mixes rows that stand for old abilities into the batches of new ones.

    batch = (1 − ρ(t)) new rows + ρ(t) old rows          (Rolnick et al. 2018, arXiv:1811.11682)

ρ = fraction, counted in rows or supervised tokens and followed at every step, or in blocks after `every` steps, which
hold as much; t = steps done of all steps, so that the mean of ρ is the share in all that is shown.
Old rows are those of earlier tasks (a reservoir on disk; of a streamed task none is kept) and, for what the model could
do before: rows the user gives as `old`, otherwise conversations that the model writes with itself before training
starts (Magpie header, arXiv:2406.08464; self-written replay, arXiv:2602.20162). `source: demonstrations` writes rows
like a few that are given: inputs in context, answers by the latest model, k-means for diversity (SSR,
arXiv:2403.01244). `on_policy` lets the latest model answer old prompts before each task and keeps what a check finds
right (OPR, arXiv:2605.29495). What was written, and by which weights, is in the run's `buffer` folder; nothing of it
repeats an item of the probes. With a
`priority`, the row of each place is drawn late, with P(i) ∝ (u_i + floor)^exponent (Schaul et al. 2015,
arXiv:1511.05952), u = what the row is worth, measured again while training: a measurement decides from the next one on,
so that rows read ahead are the same whoever reads. Or rows come from several `sources`, of which source i gives p_i ∝
w_i n_i^(1/T): w = weight, n = its rows (or tokens), T = temperature.
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
Tune: `fraction` 0.01–0.05 for general data, 0.1–0.25 in short runs or when little may be lost; 0.15 of general rows
    when a domain is learned, which is what `sources` begin with. `priority: forgetting` where the buffer holds much
    more than is replayed; `exponent` 0.4–0.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from retain.data import replay_sources as origins
from retain.data.checking import checker
from retain.data.mixture import Mixture
from retain.data.replay_sources import Part, SourceConfig
from retain.errors import ConfigError
from retain.functional.pacing import mean_share
from retain.methods import gathering
from retain.methods.base import Method
from retain.methods.context import Run
from retain.methods.paced import Paced
from retain.methods.prioritised import Prioritised
from retain.methods.writing import Demonstrations, OnPolicy, Server
from retain.models.endpoint import check_url


class Replay(Prioritised, Method):
    """Experience replay, with self-written rows when old data are gone."""

    name = "replay"
    family = "replay"
    paper = "arXiv:1811.11682"
    off = {"fraction": 0.0}

    class Config(Prioritised.Config, Paced):
        source: Literal["auto", "old", "self", "demonstrations", "on_policy", "none"] = "auto"
        """Rows for abilities from before: the given old rows, self-written ones, whichever is there, rows written like
        the given ones, given prompts and those of earlier tasks answered anew, or none."""
        sources: list[SourceConfig] = []
        """Where replayed rows come from, instead of `source`: data, or `old`, `self`, `tasks` (earlier ones)."""
        temperature: float | None = Field(None, gt=0, allow_inf_nan=False)
        """For `sources`: 1 takes every row alike, higher values small sources more often. Not given: the weights alone
        where there are any, else 1."""
        rows: int = Field(256, ge=1)
        """Most `old` rows, drawn with the seed, or `self` rows that are taken; of the latter no more than one pass over
        the first task needs."""
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
                source = "self" if any(s.data == "self" for s in info.data.get("sources", [])) else source
            if source not in allowed and value != cls.model_fields[name].get_default():
                raise ValueError(f"without effect at source: {source}; it belongs to source: {' or '.join(allowed)}")
            return value

        @property
        def usual(self) -> float:
            """The fraction of a constant share when none is given."""
            return 0.15 if self.sources else 0.1

        @property
        def asked(self) -> set[str]:
            """What rows are replayed: paths, words for `source`, and "tasks" for those of earlier tasks."""
            return {s.data for s in self.sources} or {self.source, "tasks"} - {"none"}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        origins.check_settings(self.config)

    @property
    def active(self) -> bool:
        c = self.config  # these two end above 0 of themselves
        return c.fraction != 0 or c.schedule in ("cosine", "rising") or bool(c.end)

    @property
    def needs(self) -> frozenset[str]:
        c = self.config
        alone = c.source == "on_policy" and not c.buffer  # no prompts but those of the old rows
        return frozenset({"old"} if alone or c.asked & {"old", "demonstrations"} else ())

    def check(self, tasks: Sequence[str] = ()) -> None:
        c = self.config
        mean_share(c.share)  # an impossible schedule is an error before anything is loaded
        super().check(tasks)
        if c.source == "on_policy":
            checker(c.on_policy.check, c.on_policy.threshold)
        if c.endpoint is not None:
            check_url(c.endpoint.url)

    def check_inputs(self, tokenizer: Any) -> None:
        for source in self.config.sources:
            origins.check_rows(source)

    def keeps_text(self, old: bool) -> str | None:
        if self.config.source in ("demonstrations", "on_policy"):
            return f"source {self.config.source} writes given text; set `source: self`"
        return "keeps rows of tasks; set `buffer: 0`" if self.config.buffer and "tasks" in self.config.asked else None

    def prepare_data(self, data: Mixture, run: Run) -> Mixture:
        c = self.config
        self.check_data(data)
        if c.buffer and "tasks" in c.asked:
            run.say_unread(self.name, "none is kept for later tasks")
        share = mean_share(c.share)
        # twice what one pass needs: variety protects, and fewer are written faster
        needed = math.ceil(len(data.new) * share / (1 - share)) if hasattr(data.new, "__len__") else c.rows
        parts = gathering.parts(c, run, min(c.rows, max(16, 2 * needed)), partial(self._earlier, run))
        found = sum(len(part.rows) for part in parts)
        weights, temperature = origins.weighted(parts, c)
        rows, sources = origins.joined_parts([Part(p.name, run.tokenise(p.rows)) for p in parts], weights, temperature)
        if rows is None or sources is None:
            if run.task_index == 1 and c.asked <= {"tasks", "on_policy"}:
                only = "sources: tasks" if c.sources else f"source: {c.source}"
                run.say(f"replay: nothing to replay during the first task ({only}).")
                return data
            if found:
                raise ConfigError(
                    f"methods.replay: of {found} replay rows none has an answer within `train.max_length`. "
                    "Raise it, or give shorter rows."
                )
            raise ConfigError("methods.replay: the buffer is empty. Set `source: self`, or give `old:` rows.")
        moves = "" if c.schedule == "constant" else f" on average ({c.schedule})"
        blocks = f", in blocks every {c.every} steps" if c.every else ""
        run.say(f"replay: {sources.sentence()} rows; share {share:.1%} of {c.by}{moves}{blocks}.")
        if c.sources and run.task_index > 1 and "tasks" not in c.asked:
            run.say("replay: rows of earlier tasks are not replayed; to change that, add `tasks` to `sources`.")
        mixture = Mixture(data.new, rows, c.share, c.by, sources=sources, every=c.every, spread=c.spread)
        return self.prioritised(mixture, run)

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if self.config.buffer and run.new_rows is not None and "tasks" in self.config.asked:
            self.store(run)

    def _earlier(self, run: Run) -> Any | None:
        if not self.config.buffer:
            return None
        # a run killed after this task filled the buffer must replay what it replayed before
        buffer = self.buffer_of(run).before(run.task)
        return buffer.rows() if buffer is not None and len(buffer) else None
