"""The trials of a search in Optuna's storage: who makes which, what came of it, and how a killed search goes on.

A trial belongs to the folder in which it was begun, and to the process that holds its lock file there. The lock goes
when the process ends, however it ends; the trial is then taken over, and its run directory goes on where it stopped.
"""

from __future__ import annotations

import json
import random
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from retain.advice.pruning import Point
from retain.advice.search_space import Over
from retain.errors import RunError
from retain.report.search import Tried
from retain.results import Estimate, write_text

STATES: dict[str, Any] = {"COMPLETE": "finished", "PRUNED": "hopeless", "FAIL": "failed", "RUNNING": "running"}
#: A trial whose process ended so often is given up.
MOST_BEGUN = 3


def quiet() -> None:
    """Optuna says nothing of its own."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Study:
    """The trials of one search, as one process sees them.

    Args:
        folder: of the search; run directories of trials are `folder/trials/NUMBER`.
        storage: a file for Optuna's journal, or the address of a database; `folder/trials.journal` when not given.
        over: what is varied.
        asked: what else makes it this search and no other; plain values.

    Raises:
        RunError: the storage cannot be used, or holds another search.
    """

    def __init__(self, folder: Path, storage: str | None, over: Sequence[Over], asked: dict[str, Any]) -> None:
        quiet()
        self.folder, self.over = folder, list(over)
        folder.mkdir(parents=True, exist_ok=True)
        self._turn = FileLock(folder / ".turn")
        self._held: FileLock | None = None
        with self._turn:
            self.name = _own_name(folder / ".name")
            self.study = _opened(storage or str(folder / "trials.journal"), asked)

    # -- whose turn ----------------------------------------------------------------------------------------
    def next(self, sampler: Callable[[int], Any], most: int | None) -> Any | None:
        """A trial to carry out: one whose process ended, or a new one; None when there is nothing left to do.

        Args:
            sampler: number of a trial → Optuna's sampler for it.
            most: trials in all; None for those that are waiting.
        """
        with self._turn:
            while (left := self._abandoned()) is not None:
                begun = left.user_attrs.get("begun", 1) + 1
                if begun <= MOST_BEGUN:
                    left.set_user_attr("begun", begun)
                    return left
                self.end(left, "FAIL", reason=f"its process ended {MOST_BEGUN} times before it did")
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(t.state.name == "WAITING" for t in trials)
            if not waiting and (most is None or len(trials) >= most):
                return None
            self.study.sampler = sampler(len(trials))
            new = self.study.ask({one.path: one.distribution() for one in self.over})
            new.set_user_attr("folder", self.name)
            self._take(new.number)
            return new

    def _abandoned(self) -> Any | None:
        from optuna.trial import Trial

        for trial in self.study.get_trials(deepcopy=False):
            mine = trial.user_attrs.get("folder") == self.name
            if trial.state.name == "RUNNING" and mine and self._take(trial.number):
                return Trial(self.study, trial._trial_id)
        return None

    def _take(self, number: int) -> bool:
        lock = FileLock(self.folder / f".trial-{number:04d}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._held = lock
        return True

    def directory(self, number: int) -> Path:
        """Run directory of a trial."""
        return self.folder / "trials" / f"{number:04d}"

    # -- plans ---------------------------------------------------------------------------------------------
    def plan(self, points: Sequence[dict[str, Any]]) -> None:
        """Have these values tried first, in this order, unless the search has begun."""
        with self._turn:
            if not self.study.get_trials(deepcopy=False):
                for values in points:
                    self.study.enqueue_trial(values)

    def add(self, values: dict[str, Any]) -> None:
        """Have these values tried next."""
        with self._turn:
            self.study.enqueue_trial(values)

    # -- what came of it -----------------------------------------------------------------------------------
    def end(self, trial: Any, state: str, values: Sequence[float] | None = None, **found: Any) -> None:
        """Write down how a trial ended: what is kept of it, then its state."""
        from optuna.trial import TrialState

        for name, value in found.items():
            trial.set_user_attr(name, value)
        self.study.tell(trial.number, list(values) if values is not None else None, state=TrialState[state])
        self.release()
        (self.folder / f".trial-{trial.number:04d}").unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of the trial that this process holds: what is not ended may be taken over."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def points(self, point: str, but: int) -> list[tuple[int, Point | None]]:
        """Numbers of the finished trials, but one, and how they stood at a point."""
        finished = [t for t in self.study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and t.number != but]
        stood = [(t.number, t.user_attrs.get("points", {}).get(point)) for t in finished]
        return [(number, None if values is None else Point.of(values)) for number, values in stood]

    def tried(self) -> list[Tried]:
        """All trials that were begun, by number."""
        return [
            Tried(
                number=t.number,
                values=values_of(self.over, t.params),
                state=STATES[t.state.name],
                learned=_estimate(t.user_attrs.get("learned")),
                lost=_estimate(t.user_attrs.get("lost")),
                steps=t.user_attrs.get("steps", 0),
                seconds=t.user_attrs.get("seconds", 0.0),
                reason=t.user_attrs.get("reason", ""),
                directory=str(self.directory(t.number).relative_to(self.folder)),
            )
            for t in self.study.get_trials(deepcopy=False)
            if t.state.name in STATES
        ]

    @property
    def open(self) -> int:
        """How many trials are waiting or under way."""
        return sum(t.state.name in ("WAITING", "RUNNING") for t in self.study.get_trials(deepcopy=False))


def values_of(over: Sequence[Over], params: dict[str, Any]) -> dict[str, Any]:
    """Path → value of a trial, as they are written into its configuration."""
    return {
        one.path: params[one.path] if one.values else one.number(params[one.path]) for one in over if one.path in params
    }


def sampler(mode: str, seed: int, number: int) -> Any:
    """Optuna's sampler for the trial of this number: two searches with one seed and one history try the same."""
    from optuna import samplers

    drawn = random.Random(f"{seed} {number}").getrandbits(31)
    if mode == "tpe":
        return samplers.TPESampler(n_startup_trials=10, multivariate=True, seed=drawn)
    return samplers.RandomSampler(seed=drawn)


def _own_name(path: Path) -> str:
    """By which a folder is known in a storage that several folders share."""
    if not path.is_file():
        write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def _opened(storage: str, asked: dict[str, Any]) -> Any:
    import optuna

    try:
        place: Any = storage
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

            lock = JournalFileSymlinkLock(storage)
            _without_half_line(Path(storage), lock)
            place = JournalStorage(JournalFileBackend(storage, lock_obj=lock))
        study = optuna.create_study(
            study_name="retain search", storage=place, directions=["maximize", "minimize"], load_if_exists=True
        )
        text = json.dumps(asked, sort_keys=True, default=str)
        earlier = study.user_attrs.get("asked")
        if earlier is None:
            study.set_user_attr("asked", text)
    except Exception as error:  # of a file, of SQLAlchemy, of a driver that is not there
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{storage}: cannot be used as the storage of a search ({reason}). Give another one.") from error
    if earlier not in (None, text):
        before, now = json.loads(earlier), json.loads(text)
        differs = next(key for key in now if now[key] != before.get(key))
        values = f"{_short(before.get(differs))}; now {_short(now[differs])}"
        raise RunError(
            f"{storage}: holds a search with other `{differs}` ({values}). Use the same, or another --output."
        )
    return study


def _without_half_line(path: Path, lock: Any) -> None:
    """Cut off what a process that was killed while writing left of its last line."""
    if not path.is_file() or not path.stat().st_size:
        return
    lock.acquire()
    try:
        with open(path, "rb+") as file:
            text = file.read()
            if not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)
    finally:
        lock.release()


def _estimate(values: dict[str, float] | None) -> Estimate | None:
    return None if values is None else Estimate(**values)


def _short(value: Any, most: int = 80) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
