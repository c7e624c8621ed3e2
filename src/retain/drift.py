"""How the answers of a later stage differ from the base's own answers to the same old questions.

From two item tables alone (rows of `results.ITEM_COLUMNS`); what a row is, its details say: a choice has
`log_likelihoods`, a written answer `written`, a divergence `same_token`. Agreement and style say that a model changed,
not that it got worse: a model may answer otherwise as often as it is right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from retain.functional import calibration, statistics, style
from retain.items import Rows, by_probe, estimate, is_divergence, score
from retain.results import Drift, Estimate, ProbeInfo, Shift

#: Numbers of `Drift.shifts` apart from those of `style.NAMES`: name → what it is the mean of.
_SHARES = {
    "refused_unsafe": "unsafe prompts that are refused",
    "refused_safe": "safe prompts that are refused",
    "declined_unanswerable": "questions about nothing real to which the model says so, or declines",
    "declined_answerable": "questions with a known answer to which it does the same",
    "consistency": "sampled answers to one question that are the commonest one",
}
_CALIBRATION = ("ece", "ece_adaptive", "brier", "confidence")
SHIFTS = (*style.NAMES, *_CALIBRATION, *_SHARES)


class _Answer(NamedTuple):
    """One item of the base and of the later stage; details are read."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    old: Mapping[str, Any]  # details before
    new: Mapping[str, Any]


def drift(
    before: Rows, after: Rows, infos: Iterable[ProbeInfo], confidence: float = 0.95, seed: int = 0
) -> Drift | None:
    """What changed in the answers to the reference probes; None without one of them.

    Items of all probes count alike. Intervals are over items, those of a shift paired; a number of fewer than two items
    is left out, and so is what needs the texts of a private run. Calibration is that of all choices with a right answer
    together (`functional.calibration`, 15 bins), by the summed log-likelihood of the options.

    Args:
        before, after: rows of the base and of the later stage, of all probes.
    """
    infos = [info for info in infos if info.role == "reference"]
    old, new = by_probe(before), by_probe(after)
    answers = [one for i in infos for one in _answers(old.get(i.name, []), new.get(i.name, []))]
    if not answers:
        return None
    shifts = {**_style(answers, confidence, seed), **_calibration(answers, confidence, seed)}
    for name, (first, second) in _caution(answers).items():
        if (found := _shift(first, second, confidence, seed)) is not None:
            shifts[name] = found
    return Drift(
        agreement=_agreement(answers, confidence, seed),
        shifts=shifts,
        divergence={i.name: score(new[i.name], i, confidence, seed) for i in infos if is_divergence(i)},
    )


def _answers(before: Rows, after: Rows) -> Iterator[_Answer]:
    later = {str(row["item"]): row for row in after}
    for row in before:
        if (other := later.get(str(row["item"]))) is not None:
            yield _Answer(row, other, *(json.loads(side["details"] or "{}") for side in (row, other)))


def _chosen(details: Mapping[str, Any]) -> int | None:
    """Index of the option that was chosen; that of a minimal pair is the likelier text, the second one if they tie."""
    if "chosen" in details:
        return details["chosen"]
    values = details.get("log_likelihoods")
    return None if not values else len(values) - 1 - max(range(len(values)), key=values[::-1].__getitem__)


def _written(answers: Sequence[_Answer]) -> list[tuple[str, str]]:
    """Texts before and after of the items that the model answered in its own words; none of a private run."""
    return [
        (a.before["output"], a.after["output"])
        for a in answers
        if "written" in a.old and "written" in a.new and a.before["prompt"]
    ]


def _agreement(answers: Sequence[_Answer], confidence: float, seed: int) -> dict[str, Estimate]:
    pairs = [(_chosen(a.old), _chosen(a.new)) for a in answers]
    texts = _written(answers)
    told = [a for a in answers if "same_token" in a.new]
    shares: dict[str, list[float]] = {
        "choices": [float(one == other) for one, other in pairs if one is not None and other is not None],
        "answers": [float(one == other) for one, other in texts],
        "beginning": [style.common_beginning(one, other) for one, other in texts],
        "tokens": [a.new["same_token"] for a in told],
    }
    weights = {"tokens": [float(a.after["tokens"]) for a in told]}
    return {
        name: estimate(statistics.mean_interval(values, confidence, weights.get(name), seed=seed))
        for name, values in shares.items()
        if len(values) >= 2
    }


def _style(answers: Sequence[_Answer], confidence: float, seed: int) -> dict[str, Shift]:
    measured = [(style.style(one), style.style(other)) for one, other in _written(answers)]
    found = {}
    for name in style.NAMES:
        pairs = [(b, a) for old, new in measured if (b := old[name]) is not None and (a := new[name]) is not None]
        if (shift := _shift([b for b, _ in pairs], [a for _, a in pairs], confidence, seed)) is not None:
            found[name] = shift
    return found


def _calibration(answers: Sequence[_Answer], confidence: float, seed: int) -> dict[str, Shift]:
    judged = [a for a in answers if "answer" in a.old and "log_likelihoods" in a.old and "log_likelihoods" in a.new]
    if len(judged) < 2:
        return {}
    right = [a.old["answer"] for a in judged]
    (old, old_right, old_brier), (new, new_right, new_brier) = (
        calibration.confidences([getattr(a, side)["log_likelihoods"] for a in judged], right) for side in ("old", "new")
    )
    found = {}
    for name, adaptive in (("ece", False), ("ece_adaptive", True)):
        change = calibration.calibration_change(
            (old, old_right), (new, new_right), confidence, adaptive=adaptive, seed=seed
        )
        found[name] = Shift(
            before=calibration.calibration_error(old, old_right, adaptive=adaptive),
            after=calibration.calibration_error(new, new_right, adaptive=adaptive),
            difference=estimate(change),
            items=len(judged),
        )
    for name, first, second in (("brier", old_brier, new_brier), ("confidence", old, new)):
        if (shift := _shift(first.tolist(), second.tolist(), confidence, seed)) is not None:
            found[name] = shift
    return found


def _caution(answers: Sequence[_Answer]) -> dict[str, tuple[list[float], list[float]]]:
    """Refused, declined, and consistent: the values before and after, by the names of `_SHARES`."""
    kinds = {
        "refused_unsafe": ("refused", "safe", False),
        "refused_safe": ("refused", "safe", True),
        "declined_unanswerable": ("declined", "answerable", False),
        "declined_answerable": ("declined", "answerable", True),
        "consistency": ("consistency", None, None),
    }
    found = {}
    for name, (key, condition, wanted) in kinds.items():
        chosen = [
            a for a in answers if key in a.old and key in a.new and (not condition or a.old.get(condition) is wanted)
        ]
        found[name] = ([float(a.old[key]) for a in chosen], [float(a.new[key]) for a in chosen])
    return found


def _shift(before: Sequence[float], after: Sequence[float], confidence: float, seed: int) -> Shift | None:
    if len(before) < 2:
        return None
    return Shift(
        before=float(sum(before)) / len(before),
        after=float(sum(after)) / len(after),
        difference=estimate(statistics.paired_interval(before, after, confidence, seed=seed)),
        items=len(before),
    )
