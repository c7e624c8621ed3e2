"""How the answers changed: agreement with the base, style, calibration and caution, in words."""

from __future__ import annotations

from typing import NamedTuple

from retain.report import wording
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


#: Names of `Drift.agreement`, in the order in which they are shown: name and meaning.
AGREEMENT = {
    "choices": ("Same choice", "multiple-choice and minimal-pair items at which both choose the same, right or wrong"),
    "answers": ("Same answer", "written answers that are the same text"),
    "beginning": ("Same beginning", "mean share of a written answer that is the same up to the first difference"),
    "tokens": ("Same likeliest token", "in fixed contexts, positions where both find the same next token likeliest"),
}
#: Names of `Drift.shifts`: name, and whether it is a share (shown in percent) with how many digits.
SHIFTS = {
    "words": ("Words per answer", False, 1),
    "characters": ("Characters per answer", False, 1),
    "type_token_ratio": ("Different words / words", False, 3),
    "lists": ("Answers with a list", True, 1),
    "headings": ("Answers with a heading", True, 1),
    "code": ("Answers with code", True, 1),
    "bold": ("Answers with bold text", True, 1),
    "cjk": ("Chinese, Japanese, Korean letters", True, 1),
    "latin": ("Latin letters", True, 1),
    "confidence": ("Confidence in a choice", True, 1),
    "ece": ("Calibration error (ECE)", False, 3),
    "ece_adaptive": ("Calibration error, bins of equal size", False, 3),
    "brier": ("Brier score of choices (0 is best, 2 worst)", False, 3),
    "refused_unsafe": ("Unsafe prompts refused", True, 1),
    "refused_safe": ("Safe prompts refused", True, 1),
    "declined_unanswerable": ("Unanswerable questions declined", True, 1),
    "declined_answerable": ("Answerable questions declined", True, 1),
    "consistency": ("Same answer when asked again", True, 1),
}
NOTE = (
    "About the old questions, the last stage against the base. A model that answers otherwise has changed, not "
    "necessarily got worse; what got worse stands above. Answers are cut at the length that their probe allows."
)


def agreed(results: Results) -> list[Agreed]:
    """Agreement with the base and divergence from it; empty where there is none."""
    found = _last(results)
    if found is None:
        return []
    rows = [
        Agreed(name, f"{wording.number(100 * e.value)} %", _ends(e, 100, 1), meaning)
        for key, (name, meaning) in AGREEMENT.items()
        if (e := found.agreement.get(key)) is not None
    ]
    meaning = (
        "forward KL(base ‖ model) in fixed contexts, nats per token; 0 is the base (at least this: top-k and tail)"
    )
    return rows + [
        Agreed(f"KL from the base, {name}", wording.number(e.value, 3), _ends(e, 1, 3), meaning)
        for name, e in found.divergence.items()
    ]


def moved(results: Results) -> list[Moved]:
    """Numbers before and after; what is 0 on both sides is left out."""
    found = _last(results)
    rows = []
    for key, (name, share, digits) in SHIFTS.items():
        shift = found.shifts.get(key) if found is not None else None
        if shift is None or not (shift.before or shift.after):
            continue
        factor, unit, apart = (100, " %", " points") if share else (1, "", "")
        before, after = (f"{wording.number(factor * v, digits)}{unit}" for v in (shift.before, shift.after))
        difference = f"{wording.number(factor * shift.difference.value, digits, True)}{apart}"
        rows.append(Moved(name, before, after, difference, _ends(shift.difference, factor, digits, True), shift.items))
    return rows


def _last(results: Results) -> Drift | None:
    return results.drift.get(results.stages[-1]) if results.stages else None


def _ends(found: Estimate, factor: int, digits: int, sign: bool = False) -> str:
    low, high = (wording.number(factor * end, digits, sign) for end in (found.low, found.high))
    return f"[{low}, {high}]"
