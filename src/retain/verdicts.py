"""The verdict of a run from the changes of its probes: numbers with intervals, and one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from retain.functional import forgetting as measures
from retain.functional import statistics
from retain.functional.verdict_intervals import Scores, verdict_intervals
from retain.items import Kind, Pair, Rows, align, by_probe, estimate, goodness, lost_shares, sign_of
from retain.results import Change, Estimate, ProbeInfo, Verdict

#: Conclusion → how the sentence names it.
_WORDS = {"lost": "lost", "gained": "gained", "cannot tell": "too few items to tell"}


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
        [scores_of(pairs[c.probe], by_name[c.probe]) for c in chosen] for chosen in (reference, tasks)
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


def scores_of(pair: Pair, info: ProbeInfo) -> Scores:
    """What `functional.verdict_intervals` resamples of a probe."""
    if pair.kind == "perplexity":
        tokens = pair.before.tokens
        return Scores(pair.before.scores / tokens, pair.after.scores / tokens, tokens, "perplexity", False)
    turned = pair.kind == "unit" and not info.higher_is_better
    before, after = (1 - side.scores if turned else side.scores for side in (pair.before, pair.after))
    higher = pair.kind == "unit" or info.higher_is_better
    return Scores(before, after, None, "higher" if higher else "lower", pair.kind == "unit")


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
    for conclusion, word in _WORDS.items():
        if names := [c.probe for c in reference if c.conclusion == conclusion]:
            tally.append(f"{word}: {_list(names)}")
    text = "; ".join([*parts, ", ".join(tally)]) + "."
    return text[0].upper() + text[1:]


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
