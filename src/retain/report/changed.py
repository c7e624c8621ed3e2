"""How the answers changed: agreement with the base, style, calibration and caution, in words."""

from __future__ import annotations

from typing import NamedTuple

from retain.report import wording
from retain.report.language import say
from retain.results import Drift, Estimate, Results


class Agreed(NamedTuple):
    """One number about both models: name, value with unit, interval, meaning."""

    name: str
    value: str
    interval: str
    meaning: str


class Moved(NamedTuple):
    """One number before and after: name, both values, difference with unit, its interval, and the items it is over."""

    name: str
    before: str
    after: str
    difference: str
    interval: str
    items: int


#: Names of `Drift.agreement`, in the order in which they are shown.
AGREEMENT = ("choices", "answers", "beginning", "tokens")
#: Names of `Drift.shifts`: whether it is a share (shown in percent), and how many digits.
SHIFTS = {
    "words": (False, 1),
    "characters": (False, 1),
    "type_token_ratio": (False, 3),
    "lists": (True, 1),
    "headings": (True, 1),
    "code": (True, 1),
    "bold": (True, 1),
    "cjk": (True, 1),
    "latin": (True, 1),
    "confidence": (True, 1),
    "ece": (False, 3),
    "ece_adaptive": (False, 3),
    "brier": (False, 3),
    "refused_unsafe": (True, 1),
    "refused_safe": (True, 1),
    "declined_unanswerable": (True, 1),
    "declined_answerable": (True, 1),
    "consistency": (True, 1),
}


def agreed(results: Results) -> list[Agreed]:
    """Agreement with the base and divergence from it; empty where there is none."""
    found = _last(results)
    if found is None:
        return []
    rows = [
        Agreed(
            say(f"agreement.{key}"),
            say("unit.percent", value=wording.number(100 * e.value)),
            _ends(e, 100, 1),
            say(f"agreement.{key}_means"),
        )
        for key in AGREEMENT
        if (e := found.agreement.get(key)) is not None
    ]
    meaning = say("agreement.kl_means")
    return rows + [
        Agreed(say("agreement.kl", name=name), wording.number(e.value, 3), _ends(e, 1, 3), meaning)
        for name, e in found.divergence.items()
    ]


def moved(results: Results) -> list[Moved]:
    """Numbers before and after; what is 0 on both sides is left out."""
    found = _last(results)
    rows = []
    for key, (share, digits) in SHIFTS.items():
        shift = found.shifts.get(key) if found is not None else None
        if shift is None or not (shift.before or shift.after):
            continue
        factor = 100 if share else 1
        before, after = (wording.number(factor * v, digits) for v in (shift.before, shift.after))
        difference = wording.number(factor * shift.difference.value, digits, True)
        if share:
            before, after = (say("unit.percent", value=v) for v in (before, after))
            difference += " " + say("unit.points")
        name = say(f"shift.{key}")
        rows.append(Moved(name, before, after, difference, _ends(shift.difference, factor, digits, True), shift.items))
    return rows


def _last(results: Results) -> Drift | None:
    return results.drift.get(results.stages[-1]) if results.stages else None


def _ends(found: Estimate, factor: int, digits: int, sign: bool = False) -> str:
    low, high = (wording.number(factor * end, digits, sign) for end in (found.low, found.high))
    return f"[{low}, {high}]"
