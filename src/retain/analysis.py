"""From item tables to the records of `results.json`: scores, changes, the task matrix and the verdict.

Rows are those of `results.ITEM_COLUMNS`; `items` says how they are read and which kinds of probe there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from retain import results
from retain.errors import RunError
from retain.functional import forgetting as measures
from retain.functional import statistics
from retain.functional.verdict_intervals import Scores, retention_interval, verdict_intervals
from retain.items import (
    Array,
    Kind,
    Measured,
    Pair,
    Rows,
    align,
    by_probe,
    estimate,
    goodness,
    is_perplexity,
    lost_shares,
    measure,
    score,
    sign_of,
)
from retain.results import Change, Estimate, ProbeInfo, Verdict

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


class Comparison(NamedTuple):
    """Two runs from the same base on the same items (`compare_runs`); losses are positive.

    `ratio` is lost_b/lost_a, None where it is not certain that A lost anything. `excess` is
    lost_b − fraction·lost_a; `holds` says that A lost something and B at most `fraction` of it, each at the
    one-sided confidence of the comparison.
    """

    lost_a: Estimate
    lost_b: Estimate
    saved: Estimate  # lost_a − lost_b
    ratio: Estimate | None
    excess: Estimate
    fraction: float
    holds: bool
    probes: list[str]
    items: int
    unit: str


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
        scores = _scores(align(old.get(one.probe, []), new.get(one.probe, []), info), info)
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


def verdict(
    found: Sequence[Change],
    infos: Iterable[ProbeInfo],
    before: Rows,
    after: Rows,
    confidence: float = 0.95,
    seed: int = 0,
    alarm: float = 0.3,
    **settings: float,
) -> Verdict | None:
    """The run in a few numbers and one sentence; None without reference probes.

    The macro difference is the mean change over the reference probes scored from 0 to 1 (better = positive),
    items resampled within each probe. The mean reference score is over the same probes; where there are none,
    the mean retention stands for it. The gain on a task probe is relative to its score before; from a score
    of 0 any gain counts as 100 %.

    Args:
        found: from `changes`.
        before, after: the rows of all probes.
        alarm: relative drop over which a reference probe is named in `lost_over_threshold`.
        settings: weights and thresholds of `functional.forgetting.verdict_numbers`.

    Raises:
        RunError: as `change`.
    """
    by_name = {info.name: info for info in infos}
    reference = [c for c in found if by_name[c.probe].role == "reference"]
    tasks = [c for c in found if by_name[c.probe].role == "task"]
    if not reference:
        return None
    old, new = by_probe(before), by_probe(after)
    pairs = {c.probe: align(old.get(c.probe, []), new.get(c.probe, []), by_name[c.probe]) for c in found}
    counted = [c for c in reference if pairs[c.probe].kind == "unit"]
    difference = one_sided = None
    if counted:
        better = [sign_of(by_name[c.probe]) * pairs[c.probe].difference for c in counted]
        difference, one_sided = (
            estimate(statistics.macro_interval(better, level, seed=seed)) for level in (confidence, 2 * confidence - 1)
        )
        after_scores = [goodness(by_name[c.probe], c.after.value) for c in counted]
    else:
        after_scores = [c.retention / 100 for c in reference]
    gains = [_gain(c, by_name[c.probe], pairs[c.probe].kind) for c in tasks]
    numbers = measures.verdict_numbers([c.forgetting for c in reference], gains, after_scores, **settings)
    weights = {name: value for name, value in settings.items() if name.endswith("_weight")}
    old_scores, new_scores = (
        [_scores(pairs[c.probe], by_name[c.probe]) for c in chosen] for chosen in (reference, tasks)
    )
    spread = verdict_intervals(old_scores, new_scores, numbers, confidence, seed, **weights)
    learned = [sign_of(by_name[c.probe]) * c.difference.value for c in tasks if pairs[c.probe].kind == "unit"]
    return Verdict(
        **numbers._asdict(),
        lost_over_threshold=[c.probe for c in reference if c.forgetting > alarm],
        sentence=_sentence(learned, tasks, reference, counted, by_name, difference),
        difference=difference,
        learned=_learned([c for c in tasks if pairs[c.probe].kind == "unit"], by_name, pairs, confidence, seed),
        one_sided=one_sided,
        intervals={name: estimate(interval) for name, interval in spread.items()}
        | lost_shares([pairs[c.probe] for c in reference], confidence, seed),
    )


def compare_runs(
    base: Rows,
    a: Rows,
    b: Rows,
    infos: Iterable[ProbeInfo],
    fraction: float = 0.2,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """How much of what run A lost did run B lose, on the same items: lost_B/lost_A and whether ≤ `fraction`.

    The loss of a run is the mean over probes of base − run (positive = worse; nats per token for perplexity).
    Items are resampled within probes, with their base, A and B scores together, so what they share cancels.
    `holds` rests on lost_B − fraction·lost_A, which unlike the ratio is well behaved near 0.

    Args:
        base, a, b: rows of all probes; A is the run to compare with (naive), B the one with the claim.
        infos: the probes to use: all scored from 0 to 1, or all perplexity.

    Raises:
        RunError: no probes, kinds that do not mix, items that differ; or as `change`.
    """
    infos = list(infos)
    tables = [by_probe(rows) for rows in (base, a, b)]
    plain: list[Array] = []
    padded: list[Array] = []
    kinds: set[Kind] = set()
    items = 0
    for info in infos:
        start, end_a, end_b = (table.get(info.name, []) for table in tables)
        pairs = [align(start, end, info) for end in (end_a, end_b)]
        kinds.update(pair.kind for pair in pairs)
        weights = np.ones(len(start)) if pairs[0].weights is None else pairs[0].weights
        losses = [-sign_of(info) * pair.difference * weights for pair in pairs]
        plain.append(np.stack([*losses, weights], axis=1))
        size = 1 / math.sqrt(len(infos))
        blind = any(statistics.needs_padding(pair.difference, pair.weights) for pair in pairs)
        padded.append(statistics.pad(plain[-1], [size, -size]) if blind else plain[-1])
        items += len(start)
    if len(kinds) != 1 or "other" in kinds:
        raise RunError(
            f"compare: probes {[i.name for i in infos]} are of kinds {sorted(kinds)}. Give one or more, "
            "all scored from 0 to 1 or all perplexity."
        )

    def interval(statistic: Callable[[statistics.Sums], Array], level: float = confidence) -> Estimate:
        value = float(statistic([units.sum(0) for units in plain]))
        return estimate(statistics.bootstrap(padded, statistic, level, seed=seed, value=value, bca=False))

    def loss(weight_a: float, weight_b: float) -> Callable[[statistics.Sums], Array]:
        return lambda sums: weight_a * _mean_loss(sums, 0) + weight_b * _mean_loss(sums, 1)

    lost_a, one_sided = interval(loss(1, 0)), 2 * confidence - 1
    ratio = None
    if lost_a.low > 0:
        found = interval(_ratio)
        ratio = found if math.isfinite(found.high) else None
    certain = interval(loss(1, 0), one_sided).low > 0 and interval(loss(-fraction, 1), one_sided).high <= 0
    return Comparison(
        lost_a=lost_a,
        lost_b=interval(loss(0, 1)),
        saved=interval(loss(1, -1)),
        ratio=ratio,
        excess=interval(loss(-fraction, 1)),
        fraction=fraction,
        holds=certain,
        probes=[info.name for info in infos],
        items=items,
        unit="nats per token" if kinds == {"perplexity"} else "score",
    )


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


def _learned(
    tasks: Sequence[Change], infos: Mapping[str, ProbeInfo], pairs: Mapping[str, Pair], confidence: float, seed: int
) -> Estimate | None:
    if not tasks:
        return None
    better = [sign_of(infos[c.probe]) * pairs[c.probe].difference for c in tasks]
    return estimate(statistics.macro_interval(better, confidence, seed=seed))


def _gain(found: Change, info: ProbeInfo, kind: Kind) -> float:
    before, after = found.before.value, found.after.value
    if kind == "perplexity":
        return -measures.perplexity_increase(before, after)
    b, a = (goodness(info, before), goodness(info, after)) if kind == "unit" else (before, after)
    sign = 1 if kind == "unit" else sign_of(info)
    return sign * (a - b) / b if b > 0 else float(np.sign(sign * (a - b)))


def _scores(pair: Pair, info: ProbeInfo) -> Scores:
    if pair.kind == "perplexity":
        tokens = pair.before.tokens
        return Scores(pair.before.scores / tokens, pair.after.scores / tokens, tokens, "perplexity", False)
    turned = pair.kind == "unit" and not info.higher_is_better
    before, after = (1 - side.scores if turned else side.scores for side in (pair.before, pair.after))
    higher = pair.kind == "unit" or info.higher_is_better
    return Scores(before, after, None, "higher" if higher else "lower", pair.kind == "unit")


def _task_score(stage: Mapping[str, Estimate], probes: Sequence[ProbeInfo]) -> float | None:
    if any(info.name not in stage for info in probes):
        return None
    return float(np.mean([goodness(info, stage[info.name].value) for info in probes]))


def _sentence(
    learned: list[float],
    tasks: list[Change],
    reference: list[Change],
    counted: list[Change],
    infos: Mapping[str, ProbeInfo],
    difference: Estimate | None,
) -> str:
    def moved(found: Sequence[Change]) -> str:
        return ", ".join(
            f"{c.probe} ({infos[c.probe].metric}) {c.before.value:.3g} → {c.after.value:.3g}" for c in found
        )

    parts = []
    if learned:
        verb = "learned" if np.mean(learned) > 0 else "did not learn:"
        parts.append(f"{verb} {100 * np.mean(learned):+.3g} points on {_count(len(learned), 'task probe')}")
    elif tasks:
        parts.append(f"on the new task {moved(tasks)}")
    if difference is not None:
        on = f"on {_count(len(counted), 'old ability', 'old abilities')}"
        low, high = 100 * difference.low, 100 * difference.high
        if high < 0:
            parts.append(f"lost {-100 * difference.value:.2g} points [{-high:.2g}, {-low:.2g}] {on}")
        elif low > 0:
            parts.append(f"gained {100 * difference.value:.2g} points [{low:.2g}, {high:.2g}] {on}")
        else:
            change = f"{100 * difference.value:+.2g} points [{low:+.2g}, {high:+.2g}]"
            parts.append(f"no clear change {on} ({change})")
    if apart := [c for c in reference if c not in counted]:
        parts.append(f"{'not in that average: ' if counted else ''}{moved(apart)}")
    tally = [f"{sum(c.conclusion == 'kept' for c in reference)} of {len(reference)} shown to be kept"]
    words: dict[Conclusion, str] = {
        "lost": "lost",
        "gained": "gained",
        "cannot tell": "too few items to tell",
    }
    for conclusion, word in words.items():
        if names := [c.probe for c in reference if c.conclusion == conclusion]:
            tally.append(f"{word}: {_list(names)}")
    text = "; ".join([*parts, ", ".join(tally)]) + "."
    return text[0].upper() + text[1:]


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _mean_loss(sums: statistics.Sums, column: int) -> Array:
    return np.mean([s[..., column] / s[..., -1] for s in sums], axis=0)


def _ratio(sums: statistics.Sums) -> Array:
    # A draw in which A lost nothing must count as a large ratio; dividing would make it a negative one.
    lost_a, lost_b = _mean_loss(sums, 0), _mean_loss(sums, 1)
    return np.divide(lost_b, lost_a, out=np.full_like(lost_a, np.inf), where=lost_a > 0)
