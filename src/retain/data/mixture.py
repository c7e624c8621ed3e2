"""What one task trains on: new rows, replay rows, and how much of each at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from retain.functional.pacing import in_blocks, mean_share
from retain.functional.sampling import mix, shuffled
from retain.functional.sources import Sources, odds

_MORE = 5  # stream of random numbers: which places replay gets above the plan


@dataclass
class Mixture:
    """New rows and replay rows of one task, both in the form that the trainer tokenises.

    Args:
        new: the task's rows.
        replay: rows that are mixed in, or None.
        fraction: share of replay as a function of progress through the task, 0 to 1.
        by: whether the share counts rows or supervised tokens.
        choose: (step from 0, places) → which replay rows take the places that the plan gives to replay in that step;
            None where the plan itself says which.
        sources: where the replay rows are from; None for one source without a name.
        every: optimizer steps from one block of replay to the next; None for replay in every step.
        spread: with `every`, the part of the replay that stays in every step.
    """

    new: Any
    replay: Any | None = None
    fraction: Callable[[float], float] | None = None
    by: Literal["rows", "tokens"] = "rows"
    choose: Callable[[int, int], np.ndarray] | None = None
    sources: Sources | None = None
    every: int | None = None
    spread: float = 0.0


class MixtureSampler(Sampler[int]):
    """Row numbers of one epoch after another: new rows once each, replay rows by the fraction.

    The order is a function of (seed, epoch) alone, in units of the *global* batch, so it is the same after a
    resume and for every number of ranks. Rows `0 … len(new)-1` are new, later ones are replay.

    Args:
        new_lengths, replay_lengths: supervised tokens per row (used when `by` is "tokens").
        window: rows per optimizer step over all ranks and accumulation steps.
        epochs: planned passes over the new rows; progress 1 is the end of the last.
        choose: as of `Mixture`; asked when a step's rows are read. How many places replay has is planned all the same.
        steps: planned optimizer steps; above 0 they say how many passes there are, instead of `epochs`.
        sources, every, spread: see `Mixture`.
    """

    def __init__(
        self,
        new_lengths: np.ndarray,
        replay_lengths: np.ndarray,
        fraction: Callable[[float], float],
        by: Literal["rows", "tokens"],
        window: int,
        epochs: float,
        seed: int,
        steps: int = 0,
        sources: Sources | None = None,
        every: int | None = None,
        spread: float = 0.0,
        choose: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        self.new_lengths, self.replay_lengths = np.asarray(new_lengths), np.asarray(replay_lengths)
        self.fraction, self.by, self.window, self.seed = fraction, by, window, seed
        self.sources, self.every, self.spread, self.choose = sources, every, spread, choose
        if steps > 0:
            ratio = odds(self.new_lengths, self.replay_lengths, sources) if by == "tokens" else 1.0
            epochs = steps * window * (1 - mean_share(fraction, ratio)) / max(1, len(self.new_lengths))
        self.passes = max(epochs, 1e-6)
        self.epochs = max(1, math.ceil(epochs - 1e-9))
        self.epoch = 0
        self._plan: dict[int, np.ndarray] = {}
        self._raised: list[tuple[int, float]] = []
        self._whole: np.ndarray | None = None  # all epochs in a row, where each cannot be planned alone

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def raise_share(self, step: int, factor: float) -> None:
        """From a step on (counted from 0), let replay take `factor` times the places that the plan gives it there.

        The places come from new rows, which are then not shown; a step keeps one of them. So nothing before that step
        changes, and neither does the number of steps. The factor of the latest such step holds.
        """
        self._raised = [one for one in self._raised if one[0] < step] + [(step, factor)]

    def _with_more(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Row numbers of whole steps, the first of which is step `first`, after the shares were raised."""
        if not self._raised:
            return rows
        rows, count = rows.copy(), len(self.new_lengths)
        pool = self.plan(0)[self.plan(0) >= count]  # in it sources have their weights
        pool = pool if len(pool) else np.arange(count, count + len(self.replay_lengths))
        for begin in range(0, len(rows), self.window):
            step, part = first + begin // self.window, rows[begin : begin + self.window]
            factor = next((factor for start, factor in reversed(self._raised) if start <= step), 1.0)
            new = np.flatnonzero(part < count)
            planned = len(part) - len(new)
            more = min(round(planned * factor) - planned, len(new) - 1)
            if factor != 1 and more > 0:
                draw = np.random.default_rng([self.seed, step, _MORE])
                part[draw.choice(new, more, replace=False)] = draw.choice(pool, more)
        return rows

    def plan(self, epoch: int) -> np.ndarray:
        """The row numbers of an epoch, in order.

        The host plans every epoch as long as the first. Where a schedule makes epochs unequal, or blocks reach from
        one into the next, the rows of all epochs are therefore cut into equal parts, so that none is skipped.
        """
        if self._whole is None:
            self._whole = self._joined()
        if len(self._whole) == 0 or epoch >= self.epochs:
            return self._mixed(epoch)
        size = -(-len(self._whole) // (self.epochs * self.window)) * self.window
        return self._whole[epoch * size : (epoch + 1) * size]

    def _joined(self) -> np.ndarray:
        """All planned epochs in a row, in blocks; nothing where each can be planned alone."""
        if not self.every and len({len(self._mixed(e)) for e in range(self.epochs)}) == 1:
            return np.empty(0, dtype=np.int64)
        count = len(self.new_lengths)
        rows = np.concatenate([self._ordered(e, 1) for e in range(self.epochs)])
        if self.every:
            rows = rows[in_blocks(rows >= count, self.every * self.window, self.spread)]
        return shuffled(rows, count, self.window, self.seed)

    def _mixed(self, epoch: int) -> np.ndarray:
        if epoch not in self._plan:
            if len(self._plan) > 1:
                self._plan.clear()  # long runs: one epoch is made again in a moment, all at once need not fit
            self._plan[epoch] = self._ordered(epoch, self.window)
        return self._plan[epoch]

    def _ordered(self, epoch: int, window: int) -> np.ndarray:
        return mix(
            self.new_lengths,
            self.replay_lengths,
            self.fraction,
            seed=self.seed,
            epoch=epoch,
            epochs=self.passes if epoch < self.epochs else epoch + 1,
            by=self.by,
            window=window,
            sources=self.sources,
        )

    def steps(self, parts: int = 1) -> int | None:
        """Optimizer steps that the planned passes take, where epochs differ in length; None where they do not.

        Args:
            parts: micro-batches of a step; the host leaves out a last step that lacks some.
        """
        self.plan(0)
        assert self._whole is not None
        if not len(self._whole):
            return None
        whole, rest = divmod(len(self._whole), self.window)
        planned = self.passes / self.epochs * len(self._whole)  # the last pass may be planned in part
        return min(math.ceil(planned / self.window), whole + (math.ceil(rest * parts / self.window) == parts))

    def shown(self, steps: int) -> np.ndarray:
        """The row numbers of the first so many optimizer steps."""
        parts, epoch, done = [np.empty(0, dtype=np.int64)], 0, 0
        while steps > 0:
            rows = self.plan(epoch)
            if not len(rows):
                break
            parts.append(self._with_more(rows[: steps * self.window], done))
            done += -(-len(rows) // self.window)
            steps, epoch = steps - math.ceil(len(rows) / self.window), epoch + 1
        return np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.plan(self.epoch))

    def __iter__(self) -> Iterator[int]:
        rows = self.plan(self.epoch)
        step = sum(-(-len(self.plan(epoch)) // self.window) for epoch in range(self.epoch))
        for begin in range(0, len(rows), self.window):
            part = self._with_more(rows[begin : begin + self.window], step)
            if self.choose is not None:
                part = part.copy()
                late = part >= len(self.new_lengths)
                part[late] = len(self.new_lengths) + self.choose(step, int(late.sum()))
            yield from part.tolist()
            step += 1
