"""What one task trains on: new rows, replay rows, and how much of each at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from retain.functional.sampling import mix


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
    """

    new: Any
    replay: Any | None = None
    fraction: Callable[[float], float] | None = None
    by: Literal["rows", "tokens"] = "rows"
    choose: Callable[[int, int], np.ndarray] | None = None


class MixtureSampler(Sampler[int]):
    """Row numbers of one epoch after another: new rows once each, replay rows by the fraction.

    The order is a function of (seed, epoch) alone, in units of the *global* batch, so it is the same after a
    resume and for every number of ranks. Rows `0 … len(new)-1` are new, later ones are replay.

    Args:
        new_lengths, replay_lengths: supervised tokens per row (used when `by` is "tokens").
        window: rows per optimizer step over all ranks and accumulation steps.
        epochs: planned passes over the new rows; progress 1 is the end of the last.
        choose: as of `Mixture`; asked when a step's rows are read. How many places replay has is planned all the same.
    """

    def __init__(
        self,
        new_lengths: np.ndarray,
        replay_lengths: np.ndarray,
        fraction: Callable[[float], float],
        by: Literal["rows", "tokens"],
        window: int,
        epochs: int,
        seed: int,
        choose: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        self.new_lengths, self.replay_lengths = np.asarray(new_lengths), np.asarray(replay_lengths)
        self.fraction, self.by, self.window, self.epochs, self.seed = fraction, by, window, epochs, seed
        self.choose = choose
        self.epoch = 0
        self._plan: dict[int, np.ndarray] = {}
        self._equal: np.ndarray | None = None  # all epochs in a row, where their lengths differ

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def plan(self, epoch: int) -> np.ndarray:
        """The row numbers of an epoch, in order.

        The host plans every epoch as long as the first. Where a schedule makes epochs unequal, the rows of all
        epochs are therefore cut into equal parts, so that none is skipped.
        """
        if self._equal is None:
            first = [self._mixed(e) for e in range(self.epochs)]
            if len({len(rows) for rows in first}) > 1:
                self._equal = np.concatenate(first)
            else:
                self._equal = np.empty(0, dtype=np.int64)
        if len(self._equal) == 0 or epoch >= self.epochs:
            return self._mixed(epoch)
        size = -(-len(self._equal) // (self.epochs * self.window)) * self.window
        return self._equal[epoch * size : (epoch + 1) * size]

    def _mixed(self, epoch: int) -> np.ndarray:
        if epoch not in self._plan:
            if len(self._plan) > 1:
                self._plan.clear()  # long runs: one epoch is made again in a moment, all at once need not fit
            self._plan[epoch] = mix(
                self.new_lengths,
                self.replay_lengths,
                self.fraction,
                seed=self.seed,
                epoch=epoch,
                epochs=max(self.epochs, epoch + 1),
                by=self.by,
                window=self.window,
            )
        return self._plan[epoch]

    def __len__(self) -> int:
        return len(self.plan(self.epoch))

    def __iter__(self) -> Iterator[int]:
        rows = self.plan(self.epoch)
        if self.choose is None:
            yield from rows.tolist()
            return
        step = sum(-(-len(self.plan(epoch)) // self.window) for epoch in range(self.epoch))
        for begin in range(0, len(rows), self.window):
            part = rows[begin : begin + self.window].copy()
            late = part >= len(self.new_lengths)
            part[late] = len(self.new_lengths) + self.choose(step, int(late.sum()))
            yield from part.tolist()
            step += 1
