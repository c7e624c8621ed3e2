"""The probes that a budget is on: what they lost since the base, with bounds, and what is inside the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from retain import items
from retain.config import BudgetConfig
from retain.errors import ConfigError, DataError
from retain.functional import budget as maths
from retain.probes.asking import ask
from retain.probes.base import Probe, Subject
from retain.results import BudgetPoint, Estimate, ProbeInfo, without_text
from retain.training.looks import undisturbed
from retain.training.watch import bar

Rows = Sequence[Mapping[str, Any]]


class Spread(NamedTuple):
    """What is known of the scores of each probe: mean loss, mean squared loss, items; (G,) each."""

    means: np.ndarray
    squares: np.ndarray
    counts: np.ndarray


class Control:
    """Probes of what must be kept, and of what is being learned, against their answers of the base.

    Args:
        kept: probes that the budget is on; those that compare distributions with the base have no score of their own
            and are left out.
        learned: probes of the task.
        settings: limits and confidence.
        before: item rows of the base, or None to ask it.
        precision: the arithmetic in which the rows before were made.
    """

    def __init__(
        self,
        kept: Sequence[Probe],
        learned: Sequence[Probe],
        settings: BudgetConfig,
        before: Rows | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.kept = [probe for probe in kept if not items.is_divergence(probe.info("reference"))]
        self.learned = list(learned)
        self.settings, self.precision = settings, precision
        self.before = None if before is None else items.by_probe(before)

    @property
    def names(self) -> list[str]:
        """Of the probes that the budget is on."""
        return [probe.name for probe in self.kept]

    @property
    def items(self) -> int:
        """Of these probes, in all."""
        return sum(len(probe.items) for probe in self.kept)

    @property
    def sizes(self) -> list[int]:
        """Items of each of those that score between 0 and 1, as far as that is known before they are asked."""
        return [len(p.items) for p in self.kept if not p.info("reference").is_perplexity]

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Whether any of them scores between 0 and 1, and whether any is in nats."""
        return bool(self.sizes), len(self.sizes) < len(self.kept)

    def check(self) -> None:
        """Find out whether the budget can be certified, before anything is asked.

        Raises:
            ConfigError: no probe whose loss can be bounded, or too few items even if no answer changes.
        """
        if not self.kept:
            raise ConfigError("budget.on: no probe whose loss can be bounded. Name a suite or a file with questions.")
        maths.require_items(self.settings.lose_at_most, self.settings.confidence, self.sizes)

    def know(self, before: Rows) -> None:
        """Take these item rows for those of the base."""
        self.before = items.by_probe(before)

    def room(self, point: BudgetPoint) -> tuple[float | None, float | None]:
        """What the mean loss may be so that its bound is just inside the budget, of scores and in nats: the width of
        the bound less, but a quarter at least."""
        c = self.settings
        found: list[float | None] = []
        value = None if point.loss is None else point.loss.value
        for mean, upper, limit in (
            (value, point.upper, c.lose_at_most),
            (point.nats, point.upper_nats, c.lose_at_most_nats),
        ):
            found.append(None if mean is None or upper is None else max(limit / 4, limit - (upper - mean)))
        return found[0], found[1]

    def ask(self, model: Any, tokenizer: Any, device: torch.device, probes: Sequence[Probe]) -> list[dict[str, Any]]:
        """Item rows of probes, without a trace in the training."""
        if not probes:
            return []
        with bar(transient=True) as progress, undisturbed(model, device), self.precision():
            job = progress.add_task("budget", total=sum(len(p.items) for p in probes), note="")
            rows = ask(probes, Subject(model, tokenizer), lambda n: progress.update(job, advance=n))
        return [without_text(row) for row in rows]

    def point(self, share: float, rows: Rows) -> tuple[BudgetPoint, Spread | None]:
        """What the kept probes lost against the base, and whether that is inside the budget.

        Raises:
            DataError: too few texts for an interval.
            RunError: rows that do not fit those of the base.
        """
        c, now = self.settings, items.by_probe(rows)
        scores, texts = self._losses(now)
        loss = nats = spread = None
        if scores:
            groups = np.repeat(np.arange(len(scores)), [len(one) for one in scores])
            worse = np.concatenate(scores)
            loss = maths.loss_bound(np.clip(worse, 0, None), np.clip(-worse, 0, None), groups, c.confidence)
            spread = Spread(
                np.array([one.mean() for one in scores]),
                np.array([(one**2).mean() for one in scores]),
                np.array([float(len(one)) for one in scores]),
            )
        if texts:
            nats = maths.nats_bound([d for d, _ in texts], [w for _, w in texts], c.confidence)
        inside = (loss is None or loss.upper <= c.lose_at_most) and (nats is None or nats.upper <= c.lose_at_most_nats)
        point = BudgetPoint(
            share=share,
            loss=None if loss is None else Estimate(value=loss.value, low=loss.low, high=loss.high),
            upper=None if loss is None else loss.upper,
            nats=None if nats is None else nats.value,
            upper_nats=None if nats is None else nats.upper,
            inside=inside,
        )
        return point, spread

    def _losses(self, now: Mapping[str, Rows]) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray | None]]]:
        """By how much items are worse than before: of each probe with scores, and of each with nats, with weights."""
        assert self.before is not None
        scores: list[np.ndarray] = []
        texts: list[tuple[np.ndarray, np.ndarray | None]] = []
        for probe in self.kept:
            info = probe.info("reference")
            pair = items.align(self.before[probe.name], now[probe.name], info)
            worse = -items.sign_of(info) * pair.difference
            if pair.kind == "unit":
                scores.append(worse)
            elif pair.kind == "perplexity":
                texts.append((worse, pair.weights))
        if not scores and not texts:
            raise DataError(f"budget.on: no probe of {', '.join(self.names)} scores between 0 and 1, or in nats.")
        return scores, texts

    def gain(self, rows: Rows) -> float | None:
        """By how much the task's probes are better than of the base: in the mean of those that score between 0 and 1,
        else in nats per token; None without any."""
        assert self.before is not None
        now = items.by_probe(rows)
        found: dict[str, list[float]] = {}
        for probe in self.learned:
            if probe.name in now and probe.name in self.before:
                info: ProbeInfo = probe.info("task", probe.name)
                pair = items.align(self.before[probe.name], now[probe.name], info)
                better = float(np.average(items.sign_of(info) * pair.difference, weights=pair.weights))
                found.setdefault(pair.kind, []).append(better)
        kind = next((kind for kind in ("unit", "perplexity", "other") if kind in found), None)
        return float(np.mean(found[kind])) if kind else None

    def excess(self, point: BudgetPoint) -> float:
        """The largest bound of a loss, relative to what it may be."""
        c = self.settings
        bounds = ((point.upper, c.lose_at_most), (point.upper_nats, c.lose_at_most_nats))
        return max(upper / limit for upper, limit in bounds if upper is not None)

    def guess(self, end: BudgetPoint, spread: Spread | None) -> float:
        """At what share the bound reaches the budget, if the loss grows with the square of the share.

        Of the bound for scores, what would be there without any change does not grow.
        """
        floor = 0.0
        if spread is not None:
            nothing = np.zeros_like(spread.means)
            least = maths.upper_of(nothing, nothing, spread.counts, self.settings.confidence)
            floor = min(0.95, least / self.settings.lose_at_most)
        return math.sqrt((1 - floor) / max(self.excess(end) - floor, 1 - floor))
