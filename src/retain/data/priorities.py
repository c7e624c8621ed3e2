"""Which replay row fills a place of the plan, decided late, from priorities that change while training.

Training is cut into blocks of `refresh` steps. At the end of a block some rows are measured again; what was found
decides from the block after the next one on. The block between is drawn from what was known before, since a data
loader reads ahead: rows of the next step are fetched before this step is over. So the rows of a step are a function
of (seed, step, places, priorities of its block), whoever asks, however early and however often: prefetching, worker
processes and several ranks change nothing, and a run that is continued draws the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from retain.errors import ConfigError, RunError
from retain.functional.priorities import annealed, draw, importance_weights, probabilities

_STREAM = 4  # of random numbers, beside those of `retain.functional.sampling`


class Priorities:
    """Priorities of replay rows, of this block and of the next, and the draws from them.

    Args:
        count: number of replay rows.
        seed: non-negative integers.
        refresh: steps of a block; 0 for priorities that never change.
        exponent, floor: as of `retain.functional.priorities.probabilities`.
    """

    def __init__(self, count: int, seed: Sequence[int], refresh: int, exponent: float, floor: float) -> None:
        self.count, self.seed, self.refresh = count, list(seed), refresh
        self.exponent, self.floor = exponent, floor
        self.block = 0  # that the training is in
        self.current = self.next = np.zeros(count)  # of this block, of the next one
        self.measured = np.full(count, -1, np.int64)  # steps done when a row was measured last
        self.seen = np.empty(0, np.int64)  # rows replayed in this block so far
        self._places: dict[int, int] = {}  # step → replay rows in it
        self._chances: dict[int, np.ndarray] = {}  # block → P

    def begin(self, values: np.ndarray) -> None:
        """Set the first priorities, of all rows."""
        self.current = self.next = np.asarray(values, np.float64)
        self.measured[:] = 0
        self._chances.clear()

    def rows(self, step: int, places: int) -> np.ndarray:
        """The rows [places] that are replayed in a step (from 0).

        Raises:
            ConfigError: the step lies further ahead than priorities are known.
        """
        self._places[step] = places
        return draw(self.chances(step), places, np.random.default_rng([*self.seed, step, _STREAM]))

    def chances(self, step: int) -> np.ndarray:
        """P [count] that a step's rows are drawn with.

        Raises:
            ConfigError: as `rows`.
        """
        block = step // self.refresh if self.refresh else 0
        if block > self.block + 1:
            raise ConfigError(
                f"methods.replay.measure_every: {self.refresh} steps, but the data loader reads ahead further. "
                "Raise it, or lower `train.dataloader_num_workers` or `train.dataloader_prefetch_factor`."
            )
        # steps of earlier blocks are asked for only to be skipped, when a run is continued
        block = max(block, self.block)
        if block not in self._chances:
            values = self.next if block > self.block else self.current
            self._chances[block] = probabilities(values, self.exponent, self.floor)
        return self._chances[block]

    def weights(self, step: int, correction: float, progress: float) -> np.ndarray:
        """Importance weights [count] of a step's rows; the correction moves from what is given to 1."""
        return importance_weights(self.chances(step), annealed(correction, progress))

    def step_done(self, step: int) -> bool:
        """Note what was replayed in a step that is over; whether its block is over too, so that `renew` is due.

        Raises:
            ConfigError: the rows of that step were not asked for in this process.
        """
        if step not in self._places:
            raise ConfigError(
                "methods.replay.priority: the rows of a step were chosen in another process. "
                "Leave `dispatch_batches` of `train.accelerator_config` off."
            )
        self.seen = np.union1d(self.seen, self.rows(step, self._places[step]))
        self._places = {later: places for later, places in self._places.items() if later > step}
        return bool(self.refresh) and (step + 1) // self.refresh > self.block

    def to_measure(self, number: int) -> np.ndarray:
        """Rows to measure at the end of a block: half of them rows just replayed, the others those measured longest
        ago; all rows where there are no more. Which of equals is a draw."""
        order = np.random.default_rng([*self.seed, self.block, _STREAM, 0]).permutation(self.count)
        order = order[np.argsort(self.measured[order], kind="stable")]
        replayed = order[np.isin(order, self.seen)][: number // 2]
        others = order[~np.isin(order, replayed)][: number - len(replayed)]
        return np.sort(np.concatenate([replayed, others]))

    def renew(self, step: int, rows: np.ndarray, values: np.ndarray) -> None:
        """Begin the next block after a step, with new priorities for some rows, which act from the block after it."""
        after = self.next.copy()
        after[rows] = values
        self.current, self.next = self.next, after
        self.measured[rows] = step + 1
        self.block = (step + 1) // self.refresh
        self.seen = np.empty(0, np.int64)
        self._chances.clear()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a continued run needs."""
        arrays = {"current": self.current, "next": self.next, "measured": self.measured, "seen": self.seen}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | {
            "block": torch.tensor([self.block])
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            RunError: it is of another number of rows.
        """
        if "current" not in state or len(state["current"]) != self.count:
            raise RunError(
                f"methods.replay: the checkpoint holds priorities of {len(state.get('current', ()))} rows, but there "
                f"are {self.count} to replay now. Use the same old rows and settings, or start the task again."
            )
        self.current, self.next = state["current"].numpy().copy(), state["next"].numpy().copy()
        self.measured, self.seen = state["measured"].numpy().copy(), state["seen"].numpy().copy()
        self.block = int(state["block"])
        self._chances.clear()
