"""From item tables to the records of `results.json`: scores, changes, the task matrix; with the verdict (`verdicts`)
and the comparison of two runs (`against`) under one name.

Rows are those of `results.ITEM_COLUMNS`; `items` says how they are read and which kinds of probe there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from retain import results
from retain.against import Comparison, compare_runs
from retain.errors import RunError
from retain.functional import forgetting as measures
from retain.functional import statistics
from retain.functional.verdict_intervals import retention_interval
from retain.items import (
    Measured,
    Rows,
    align,
    by_probe,
    estimate,
    goodness,
    is_perplexity,
    measure,
    score,
    sign_of,
)
from retain.results import Change, Estimate, ProbeInfo
from retain.verdicts import scores_of, verdict

__all__ = [
    "MARGIN",
    "MARGIN_NATS",
    "Comparison",
    "change",
    "changes",
    "compare_runs",
    "group_deltas",
    "matrix",
    "retention_intervals",
    "score",
    "sequence",
    "verdict",
]

Conclusion = Literal["lost", "kept", "gained", "cannot tell"]

MARGIN, MARGIN_NATS = results.Thresholds().margin, results.Thresholds().margin_nats


def change(
    before: Rows,
    after: Rows,
    info: ProbeInfo,
    confidence: float = 0.95,
    seed: int = 0,
    margin: float = MARGIN,
    margin_nats: float = MARGIN_NATS,
) -> Change:
    """One probe, before against after, taken alone: `p_holm` is `p`. For several probes use `changes`.

    p is McNemar's for right/wrong scores, else of a sign-flip test. `lost`, `gained` and `kept` count
    right/wrong items; where items are not right or wrong they count items that got worse, better, or neither.
    The conclusion is the first that applies:

    1. "lost" or "gained": the paired interval excludes 0 on that side *and* the Holm-adjusted p is below
       1 − confidence;
    2. "kept": the one-sided bound of the loss at this confidence is at most the margin;
    3. "cannot tell": more items are needed.

    A loss that is certain but smaller than the margin is therefore called "lost".

    Args:
        margin: largest loss that counts as kept, in the unit of the score (0.02 = 2 points).
        margin_nats: the same for perplexity, in nats per token.

    Raises:
        RunError: the items (or, for perplexity, their tokens) differ before and after; or as `score`.
    """
    measured = measure(before, after, info, confidence, seed, margin, margin_nats)
    return _concluded(measured, measured.change.p, confidence)


def changes(
    before: Rows,
    after: Rows,
    infos: Iterable[ProbeInfo],
    confidence: float = 0.95,
    seed: int = 0,
    margin: float = MARGIN,
    margin_nats: float = MARGIN_NATS,
) -> list[Change]:
    """Every probe before against after, with p values adjusted over all of them (Holm 1979).

    `detectable` holds for the adjusted p, in the worst case, that no other probe changed.

    Args and errors as `change`; `before` and `after` hold the rows of all probes of a stage, in any order.
    """
    old, new, infos = by_probe(before), by_probe(after), list(infos)
    settings = (confidence, seed, margin, margin_nats, len(infos))
    measured = [measure(old.get(i.name, []), new.get(i.name, []), i, *settings) for i in infos]
    adjusted = statistics.holm([m.change.p for m in measured])
    return [_concluded(m, float(p), confidence) for m, p in zip(measured, adjusted)]


def retention_intervals(
    before: Rows,
    after: Rows,
    found: Iterable[Change],
    infos: Iterable[ProbeInfo],
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Probe → its retention in percent (`Change.retention`) with a paired bootstrap interval, items resampled.

    Args:
        before, after: the rows of all probes.
        found: from `changes`.

    Raises:
        RunError: as `change`.
    """
    old, new, by_name = by_probe(before), by_probe(after), {info.name: info for info in infos}
    intervals = {}
    for one in found:
        info = by_name[one.probe]
        scores = scores_of(align(old.get(one.probe, []), new.get(one.probe, []), info), info)
        intervals[one.probe] = estimate(retention_interval(scores, one.retention, confidence, seed))
    return intervals


def matrix(
    scores: Mapping[str, Mapping[str, Estimate]], infos: Iterable[ProbeInfo], tasks: Sequence[str]
) -> list[list[float | None]]:
    """R[i][j] = score on task j after stage i, larger is better; None where it was not probed.

    A task with several probes gets their mean; its perplexity probes count only where it has no other, as
    1/perplexity (the geometric mean probability of a token). Where lower is better, 1 − score.

    Args:
        scores: stage → probe → score, stages in order, the base first (`Results.scores`).
        tasks: names in the order of training.

    Raises:
        RunError: the number of stages is not that of the tasks + 1, or a task has no probe.
    """
    infos = list(infos)
    if len(scores) != len(tasks) + 1:
        raise RunError(f"matrix: {len(scores)} stages for {len(tasks)} tasks. Give the base and one per task.")
    probes: dict[str, list[ProbeInfo]] = {}
    for task in tasks:
        mine = [info for info in infos if info.role == "task" and info.task == task]
        probes[task] = [info for info in mine if not is_perplexity(info)] or mine
        if not mine:
            raise RunError(f"matrix: task '{task}' has no probe. Give it a test set or a probe with its name.")
    return [[_task_score(stage, probes[task]) for task in tasks] for stage in scores.values()]


def sequence(rows: Sequence[Sequence[float | None]], single_task: Sequence[float] | None = None) -> results.Sequence:
    """Accuracy, transfer and forgetting of a task matrix (`functional.forgetting.sequence_metrics`).

    Raises:
        DataError: a cell that a number needs is missing.
    """
    return results.Sequence(**measures.sequence_metrics(rows, single_task)._asdict())


def group_deltas(
    tables: Mapping[str, Rows], infos: Iterable[ProbeInfo], confidence: float = 0.95, seed: int = 0
) -> dict[str, list[Estimate | None]]:
    """Per group of reference probes, the change of its mean score since the base after each stage; positive = better.

    Each with a paired bootstrap interval. Only probes scored from 0 to 1 count; None at a stage where a probe of the
    group was not run.

    Args:
        tables: stage → rows of all probes, stages in order, the base first.

    Raises:
        RunError: as `change`.
    """
    base, *later = map(by_probe, tables.values())
    groups: dict[str, list[ProbeInfo]] = {}
    for info in infos:
        if info.role == "reference" and not is_perplexity(info) and _is_share(base.get(info.name, [])):
            groups.setdefault(info.group, []).append(info)

    def delta(stage: Mapping[str, Rows], members: list[ProbeInfo]) -> Estimate | None:
        if any(info.name not in stage for info in members):
            return None
        better = [sign_of(i) * align(base[i.name], stage[i.name], i).difference for i in members]
        return estimate(statistics.macro_interval(better, confidence, seed=seed))

    return {group: [delta(stage, members) for stage in later] for group, members in groups.items()}


def _is_share(rows: Rows) -> bool:
    return bool(rows) and all(0 <= row["score"] <= 1 for row in rows)


def _concluded(measured: Measured, p_holm: float, confidence: float) -> Change:
    found = measured.change
    excludes_zero = found.difference.low > 0 or found.difference.high < 0
    conclusion: Conclusion
    if p_holm < 1 - confidence and excludes_zero:
        conclusion = "gained" if measured.sign * found.difference.value > 0 else "lost"
    elif measured.loss_bound <= measured.margin:
        conclusion = "kept"
    else:
        conclusion = "cannot tell"
    return found.model_copy(update={"p_holm": p_holm, "conclusion": conclusion})


def _task_score(stage: Mapping[str, Estimate], probes: Sequence[ProbeInfo]) -> float | None:
    if any(info.name not in stage for info in probes):
        return None
    return float(np.mean([goodness(info, stage[info.name].value) for info in probes]))
