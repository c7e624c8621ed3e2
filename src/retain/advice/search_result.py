"""What a search comes to: the recommended trial, `best.yaml`, the same with other seeds, and the page."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retain.advice.search import Say, Search, Units, standing
from retain.config import dump
from retain.pipeline import run
from retain.report import search as page
from retain.report.language import speaking
from retain.report.search import ENOUGH, SOME, Again, Found, Rule, Tried
from retain.results import Estimate, write_text
from retain.rundir import RunDirectory


def choose(
    trials: Sequence[Tried], lose_at_most: float | None = None, weights: tuple[float, float] | None = None
) -> tuple[Tried, Rule] | None:
    """The recommended trial, and by which rule; None where none finished.

    With a limit: who learned the most among those that lost no more. Without: who has the best balance, of those that
    learned half of the most or more; without weights, who lost the least of those that learned 95 % of the most.

    Args:
        weights: of what was kept and of what was learned, where both are shares of a score.
    """
    done = [t for t in trials if t.state == "finished" and t.learned is not None and t.lost is not None]
    if not done:
        return None

    def learned(trial: Tried) -> float:
        assert trial.learned is not None
        return trial.learned.value

    def lost(trial: Tried) -> float:
        assert trial.lost is not None
        return trial.lost.value

    if lose_at_most is not None:
        within = [t for t in done if lost(t) <= lose_at_most]
        if within:
            return max(within, key=lambda t: (learned(t), -lost(t))), "rule_limit"
        return min(done, key=lambda t: (lost(t), -learned(t))), "rule_over"
    most = max(map(learned, done))
    if most <= 0:
        return max(done, key=lambda t: (learned(t), -lost(t))), "rule_most"
    enough = [t for t in done if learned(t) >= (SOME if weights else ENOUGH) * most]
    if weights is None:
        return min(enough, key=lambda t: (lost(t), -learned(t))), "rule_share"
    keep, learn = weights
    return max(enough, key=lambda t: (learn * learned(t) - keep * lost(t), learned(t))), "rule_balance"


def saved(trials: Sequence[Tried]) -> float | None:
    """Share of the optimizer steps that ending hopeless trials saved; None where no trial finished.

    What a trial that was ended would have taken is told by the mean of the finished ones.
    """
    finished = [t.steps for t in trials if t.state == "finished"]
    ended = [t.steps for t in trials if t.state == "hopeless"]
    if not finished or not sum(finished):
        return None
    whole = float(np.mean(finished))
    return sum(max(0.0, whole - steps) for steps in ended) / (whole * (len(finished) + len(ended)))


def conclude(search: Search, units: Units, confirm: int = 0, say: Say = print) -> Found:
    """Choose, write `best.yaml` and the page, and where asked run the chosen trial again with other seeds.

    Args:
        confirm: so many seeds, two or more; 0 for none.
    """
    study = search.study()
    trials, config = study.tried(), search.config
    with speaking(config.language):
        weights = (config.verdict.keep_weight, config.verdict.learn_weight)
        scores = units.learned == units.lost == "points"
        chosen = choose(trials, search.lose_at_most, weights if scores else None)
        found = Found(
            name=config.title,
            model=config.model.name,
            tasks=config.task_names,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            mode=search.mode,
            over=[str(one) for one in search.over] or ["all strengths, times 1, 2, 4, …"],
            seed=config.seed,
            confidence=config.probes.confidence,
            learned_unit=units.learned,
            lost_unit=units.lost,
            trials=trials,
            best=chosen[0].number if chosen else None,
            rule=chosen[1] if chosen else None,
            limit=search.lose_at_most,
            steps_saved=saved(trials),
        )
        page.write(found, search.folder)
        if chosen is None:
            return found
        _write_best(search, chosen[0], found)
        if confirm:
            found = found.model_copy(update={"again": again(search, units, chosen[0], confirm, say)})
            page.write(found, search.folder)
    return found


def again(search: Search, units: Units, trial: Tried, count: int, say: Say) -> Again:
    """The trial with `count` other seeds: also other rows are held out, so the base is asked anew for each."""
    runs = []
    for seed in range(search.config.seed + 1, search.config.seed + 1 + count):
        name = f"{trial.number:04d}-seed-{seed}"
        config = search.of(trial.values, output=str(search.folder / "again" / name), name=name, seed=seed)
        say(f"trial {trial.number} again, seed {seed}")
        place = RunDirectory(config.directory)
        results = run(config, say)
        point = standing(results, place, units)
        assert point is not None
        seconds = round(math.fsum(s.seconds for s in results.training), 1)
        runs.append(
            Tried(
                number=trial.number, values={"seed": seed}, state="finished", seconds=seconds, steps=point.steps
            ).model_copy(update={"learned": point.learned, "lost": point.lost, "directory": f"again/{name}"})
        )
    level = search.config.probes.confidence
    return Again(
        seeds=[run.values["seed"] for run in runs],
        learned=over_runs([run.learned.value for run in runs if run.learned], level),
        lost=over_runs([run.lost.value for run in runs if run.lost], level),
        runs=runs,
    )


def over_runs(values: Sequence[float], confidence: float) -> Estimate:
    """Mean of n ≥ 2 runs with Student's interval."""
    from scipy import stats

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    half = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def _write_best(search: Search, trial: Tried, found: Found) -> Path:
    """The chosen configuration, for `retain run`."""
    path = search.folder / "best.yaml"
    config = search.of(trial.values, output=str(search.folder / "best"), name=f"{search.config.title}-best")
    about = [
        f"Trial {trial.number} of a search ({search.mode}): {page.rule(found)}.",
        f"learned {page.amount(trial.learned, found.learned_unit)} {found.learned_unit}, "
        f"lost {page.amount(trial.lost, found.lost_unit)} {found.lost_unit}.",
        "Chosen by these numbers, so they are optimistic.",
    ]
    write_text(path, "".join(f"# {line}\n" for line in about) + dump(config))
    return path
