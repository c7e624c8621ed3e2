"""A search: runs with other strengths, shares, ranks and rates, judged by what they learned and what they lost.

Every trial is an ordinary run directory, `trials/NUMBER`; the base is asked once, in `base`, for all of them. Which
values are tried next is Optuna's work (its storage, its samplers); what is done with a trial is here.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from retain import analysis
from retain.advice.pruning import Hopeless, Point, beaten_by, looks_count
from retain.advice.search_space import Over, applied, check, current, largest, strength_of
from retain.advice.search_study import Study, sampler, values_of
from retain.config import RunConfig
from retain.errors import ConfigError, disk_full
from retain.items import is_divergence
from retain.pipeline import Watch, measure_base, plan, run
from retain.report import wording
from retain.report.search import Tried, Unit, beaten
from retain.results import Estimate, ProbeInfo, Results, load_items
from retain.rundir import BASE, RunDirectory, share_baseline

Say = Callable[[str], None]

MODES = ("tpe", "random", "grid", "raise")
#: Trials when nothing is said; a grid has as many as it has points.
TRIALS = {"tpe": 20, "random": 20, "raise": 8}
#: What `raise` multiplies all strengths by, and its name among the values of a trial.
STEP, FACTOR = 2.0, "factor"
#: No factor is beyond it, however many trials are allowed.
FARTHEST = STEP**30


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        config: the run of which settings are varied.
        over: what is varied; of `raise` nothing, as it varies all strengths together.
        folder: where everything is kept.
        mode: `tpe` (two objectives), `random`, `grid`, or `raise`.
        trials: at most so many in all.
        points: values of each range in a grid.
        storage: a file or the address of a database, for several machines; in the folder when not given.
        prune: end hopeless trials early.
        keep_all: keep the weights of finished trials, too, that another one beats in both numbers.
        lose_at_most: of `raise`, and for the choice: largest loss, a share (or nats per token).
        learn_at_least: of `raise`: stop when less is learned.
    """

    config: RunConfig
    over: list[Over]
    folder: Path
    mode: str = "tpe"
    trials: int | None = None
    points: int = 5
    storage: str | None = None
    prune: bool = True
    keep_all: bool = False
    lose_at_most: float | None = None
    learn_at_least: float | None = None

    @property
    def most(self) -> int | None:
        """Trials in all, where that is known beforehand by more than the size of a grid."""
        return self.trials if self.trials is not None else TRIALS.get(self.mode)

    @property
    def varied(self) -> list[Over]:
        """What Optuna is told of."""
        if self.mode == "raise":
            return [Over(FACTOR, 1.0, FARTHEST, log=True)]
        return self.over

    def of(self, values: dict[str, Any], **own: Any) -> RunConfig:
        """The configuration with the values of a trial, and other top-level settings."""
        if self.mode == "raise":
            values = {
                f"methods.{method.name}.strength": float(f"{strength_of(method) * values[FACTOR]:.6g}")
                for method in plan(self.config).stack.methods
                if strength_of(method) and math.isinf(largest(method))
            }
        return applied(self.config, values, **own)

    def grid(self) -> list[dict[str, Any]]:
        """The values of every trial of a grid; where only so many may be tried, they are drawn from all over it."""
        import itertools
        import random

        axes = [[(one.path, value) for value in one.points(self.points)] for one in self.over]
        every = [dict(point) for point in itertools.product(*axes)]
        if self.trials is None or self.trials >= len(every):
            return every
        kept = sorted(random.Random(self.config.seed).sample(range(len(every)), self.trials))
        return [every[i] for i in kept]

    def study(self) -> Study:
        """The trials.

        Raises:
            RunError: as `Study`.
        """
        free = {"output", "name", "verdict", "language"}
        grid = {"grid": str((self.points, self.trials))} if self.mode == "grid" else {}
        asked = self.config.model_dump(mode="json", exclude=free) | {"mode": self.mode} | grid
        return Study(self.folder, self.storage, self.varied, asked | {"over": [str(one) for one in self.varied]})


@dataclass(frozen=True)
class Units:
    """In what the two numbers of a trial are, by the kinds of its probes."""

    learned: Unit
    lost: Unit


def prepare(search: Search, say: Say) -> Units:
    """Check everything that can be known before a training, ask the base, and plan the first trials.

    Raises:
        ConfigError: nothing to vary or nothing that is measured.
        RetainError: as `pipeline.run` and `Study`.
    """
    if search.mode == "raise":
        if not any(strength_of(m) and math.isinf(largest(m)) for m in plan(search.config).stack.methods):
            raise ConfigError("--mode raise: no method here has a strength without an end. Add ewc, l2sp or distill.")
        plan(search.of({FACTOR: FARTHEST}))
    else:
        check(search.over, search.config)
    study = search.study()
    try:
        with FileLock(search.folder / ".base"):
            infos = measure_base(applied(search.config, {}, output=str(search.folder / "base")), say)
        units = Units(_unit(infos, "task"), _unit(infos, "reference"))
        if search.mode == "grid":
            study.plan(search.grid())
        elif search.mode != "raise" and (own := current(search.config, search.over)) is not None:
            study.plan([own])  # what the user has now is the first thing to beat
    finally:
        study.release()
    return units


def work(search: Search, units: Units, say: Say, told: Callable[[Tried], None] = lambda trial: None) -> None:
    """Carry out trials until nothing is left to do; several processes may do so at once.

    Args:
        say: receives the lines of the runs.
        told: receives every trial that ended.
    """
    study = search.study()
    try:
        while True:
            if search.mode == "raise" and not study.open and (factor := following(search, units, study.tried())):
                study.add({FACTOR: factor})
            most = None if search.mode in ("grid", "raise") else search.most
            trial = study.next(lambda number: sampler(search.mode, search.config.seed, number), most)
            if trial is None:
                return
            carry_out(search, study, trial, units, say)
            for lost in () if search.keep_all else beaten(study.tried()):
                RunDirectory(search.folder / lost.directory).drop_models()
            told(next(t for t in study.tried() if t.number == trial.number))
    finally:
        study.release()


def following(search: Search, units: Units, tried: list[Tried]) -> float | None:
    """The next factor of `raise`; None when enough is kept, too little is learned, or all is tried."""
    if not tried:
        return 1.0
    last = tried[-1]
    if len(tried) >= min(search.most or 0, 31) or last.learned is None or last.lost is None:
        return None
    enough = last.lost.value <= limit(search, units)
    little = search.learn_at_least is not None and last.learned.value < search.learn_at_least
    return None if enough or little else STEP * float(last.values[FACTOR])


def limit(search: Search, units: Units) -> float:
    """The largest loss that counts as kept: what was asked for, else the margin of the verdict."""
    if search.lose_at_most is not None:
        return search.lose_at_most
    own = search.config.verdict
    return own.margin if units.lost == "points" else own.margin_nats


def carry_out(search: Search, study: Study, trial: Any, units: Units, say: Say) -> None:
    """One trial, from its run directory to its numbers in the storage; a failure is written down with its reason.

    Raises:
        RunError: a full disk: that is no property of the trial.
    """
    place = RunDirectory(study.directory(trial.number))
    begin = time.monotonic()
    try:
        values = values_of(search.varied, trial.params)
        config = search.of(values, output=str(place.path), name=f"trial-{trial.number:04d}")
        share_baseline(RunDirectory(search.folder / "base"), config)
        watch = _watch(search, study, trial, units, config) if search.prune and search.mode != "raise" else None
        results = run(config, say, watch)
        point = standing(results, place, units)
        if point is None or not math.isfinite(point.learned.value + point.lost.value):
            raise ValueError("what it learned or lost is not a number")
        found = point.dump() | {"seconds": round(math.fsum(s.seconds for s in results.training), 1)}
        study.end(trial, "COMPLETE", (point.learned.value, point.lost.value), **found)
    except Hopeless as end:
        seconds = round(time.monotonic() - begin, 1)
        study.end(trial, "PRUNED", reason=str(end), steps=end.steps, seconds=seconds)
    except Exception as error:
        if disk_full(error):
            raise
        study.end(trial, "FAIL", reason=" ".join(f"{_kind(error)}{error}".split())[:500])
    finally:
        _let_go()


def _watch(search: Search, study: Study, trial: Any, units: Units, config: RunConfig) -> Watch:
    """Writes down how a trial stands, and ends it where it is hopeless."""
    points: dict[str, Any] = dict(trial.user_attrs.get("points", {}))
    place = RunDirectory(config.directory)
    before = 0

    def at(name: str, mine: Point) -> None:
        points[name] = mine.dump()
        trial.set_user_attr("points", points)
        by = beaten_by(mine, study.points(name, trial.number))
        if by is not None:
            raise Hopeless(by, name, mine.steps)

    def task(results: Results) -> None:
        nonlocal before
        before = sum(step.steps for step in results.training)
        if (mine := standing(results, place, units)) is not None:
            at(f"end of task {results.tasks[-1]}", mine)

    def look(record: dict[str, Any]) -> None:
        if (units.learned, units.lost) == ("points", "points") and record.get("learned") and record.get("difference"):
            lost = _minus(Estimate(**record["difference"]))
            mine = Point(Estimate(**record["learned"]), lost, before + record["step"])
            at(f"look at step {record['step']} of task {record['task']}", mine)

    return Watch(task, look) if looks_count(config) else Watch(task)


def standing(results: Results, place: RunDirectory, units: Units) -> Point | None:
    """What a run learned and lost so far, in the units of the search; None where that was not measured."""
    last = results.stages[-1]

    def measured(role: str, unit: Unit, shares: Estimate | None) -> Estimate | None:
        """Gains, as the verdict records them; of perplexities alone, in nats per token, paired over the items."""
        if unit == "points":
            return shares
        infos = [p for p in results.probes if p.role == role and p.is_perplexity]
        if not infos:
            return None
        base, rows = load_items(place.items(BASE)), load_items(place.items(last))
        return _minus(analysis.compare_runs(base, rows, rows, infos, confidence=results.confidence).lost_b)

    verdict = results.verdict
    learned = measured("task", units.learned, verdict.learned if verdict else None)
    kept = measured("reference", units.lost, verdict.difference if verdict else None)
    if learned is None or kept is None:
        return None
    return Point(learned, _minus(kept), sum(step.steps for step in results.training))


def _unit(infos: list[ProbeInfo], role: str) -> Unit:
    mine = [info for info in infos if info.role == role and not is_divergence(info)]
    if any(wording.is_share(info) for info in mine):
        return "points"
    if any(info.is_perplexity for info in mine):
        return "nats per token"
    if role == "task":
        raise ConfigError("search: nothing measures what is learned. Give the tasks test rows (`test` or `hold_out`).")
    raise ConfigError("search: nothing measures what is lost. Name old abilities under `probes.reference`.")


def _minus(estimate: Estimate) -> Estimate:
    return Estimate(value=-estimate.value, low=-estimate.high, high=-estimate.low)


def _kind(error: Exception) -> str:
    from retain.errors import RetainError

    return "" if isinstance(error, RetainError) else f"{type(error).__name__}: "


def _let_go() -> None:
    """Free what the model of a trial held, for the next one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
