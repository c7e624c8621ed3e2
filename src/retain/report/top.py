"""What a stranger needs in ten seconds: what was lost, what was learned, and how sure that is."""

from __future__ import annotations

from typing import NamedTuple

from retain.report import gate, language, wording
from retain.report.language import say
from retain.report.wording import BigNumber
from retain.results import Change, Estimate, ProbeInfo, Results


class Fallen(NamedTuple):
    """An old ability that was lost in large part: its numbers in a line, and whether that is beyond chance."""

    words: str
    doubt: str
    shown: bool


def facts(results: Results) -> list[BigNumber]:
    """The three facts in their order, with intervals in words; empty where nothing was trained."""
    return [_lost(results), _learned(results), _sure(results)] if results.changes else []


def fallen(results: Results) -> list[Fallen]:
    """Old abilities that lost more than the alarm of the run, with before, after and the paired difference."""
    shown, _ = wording.large_losses(results)
    names = results.verdict.lost_over_threshold if results.verdict else []
    return [
        Fallen(
            say(
                "facts.alarm_row",
                name=info.name,
                before=wording.score(info, change.before.value),
                after=wording.score(info, change.after.value),
                difference=wording.difference(info, change.difference.value),
                unit=wording.unit(info),
                interval=wording.difference_interval(info, change.difference),
            ),
            say("facts.alarm_shown" if info.name in shown else "facts.alarm_chance"),
            info.name in shown,
        )
        for info, change in wording.changes_of(results, "reference")
        if info.name in names
    ]


def _lost(results: Results) -> BigNumber:
    number = wording.lost(results)
    macro = results.verdict.difference if results.verdict else None
    interval, note = "", number.note
    if macro is not None:
        ends = [-100 * bound for bound in (macro.high, macro.low)]
        interval = _interval(results, *map(_amount, ends))
        counted = [info for info, _ in wording.changes_of(results, "reference") if wording.is_share(info)]
        note = say("facts.mean_of_old", n=len(counted))
        note += "" if macro.high < 0 or macro.low > 0 else say("facts.chance")
    return BigNumber(say("facts.lost"), number.value, interval, note, number.tone)


def _learned(results: Results) -> BigNumber:
    number = wording.learned(results)
    tasks = [(info, c) for info, c in wording.changes_of(results, "task") if wording.is_share(info)]
    tasks = tasks or wording.changes_of(results, "task")
    interval, note = number.interval, number.note
    gains = [wording.gain(info, change.difference) for info, change in tasks]
    if len(tasks) > 1 and results.verdict and results.verdict.learned and wording.is_share(tasks[0][0]):
        note += say("list.colon") + say("list.comma").join(
            f"{info.name} {wording.difference(info, gain.value)}" for (info, _), gain in zip(tasks, gains)
        )
        gains = [results.verdict.learned]
    if len(gains) == 1:
        info = tasks[0][0]
        low, high = (wording.difference(info, bound) for bound in (gains[0].low, gains[0].high))
        interval = _interval(results, low, f"{high} {wording.unit(info)}")
    return BigNumber(say("facts.learned"), number.value, interval, note, number.tone)


def _interval(results: Results, low: str, high: str) -> str:
    return say("facts.interval", percent=wording.confidence(results), low=low, high=high)


def _amount(points: float) -> str:
    text = wording.number(abs(points))
    if float(text) == 0:
        return say("facts.zero_amount")
    return say("facts.lost_amount" if points > 0 else "facts.gained_amount", amount=text)


def _sure(results: Results) -> BigNumber:
    """Kept, lost, or not enough items to tell; and what of the old score is left."""
    old = wording.changes_of(results, "reference")
    if not old:
        return BigNumber(say("facts.sure"), say("facts.not_measured"), "", say("facts.no_old"), "unknown")
    tone = wording.old_tone(results)
    word, why = _decided(results, [change for _, change in old], tone)
    names = [change.probe for _, change in old if change.conclusion == "lost"]
    shown = say("facts.shown_lost", names=wording.listed(names)) if names else ""
    return BigNumber(say("facts.sure"), word, why, shown, tone)


def _decided(results: Results, old: list[Change], tone: wording.Tone) -> tuple[str, str]:
    limit, found = results.thresholds.margin, gate.bounds(results)
    macro = results.verdict.difference if results.verdict else None
    if found is None or macro is None:
        word = {"good": "was_kept", "bad": "was_lost", "unknown": "not_enough"}[tone]
        why = {"good": "each_kept", "bad": "some_probe", "unknown": "no_probe"}[tone]
        return say(f"facts.{word}"), say(f"facts.{why}")
    said = {"limit": f"{100 * limit:g} {say('unit.points')}"}
    outcome = gate.decide(found.low, found.high, limit)
    if outcome == "lost":
        return say("facts.was_lost"), say("facts.certain", **said)
    if macro.high < 0:
        return say("facts.was_lost"), say("facts.some_small" if outcome == "kept" else "facts.some", **said)
    if outcome == "kept":
        return say("facts.kept_mean" if tone == "bad" else "facts.was_kept"), say("facts.ruled_out", **said)
    if tone == "good":  # every probe by itself, though not their mean
        return say("facts.was_kept"), say("facts.each_kept")
    return say("facts.not_enough"), say("facts.open", **said)


def left(results: Results) -> str:
    """What of the old score is left, in a line; "" where that was not measured."""
    number = wording.kept(results)
    return say("facts.kept", value=number.value, interval=number.interval, note=number.note) if number.interval else ""


def sentence(results: Results) -> str:
    """The verdict in a sentence: that of the results in English, the same one in another language."""
    if results.verdict is None:
        count = say("count.probes", n=len(results.probes))
        return say("sentence.only_measured", probes=count)
    return results.verdict.sentence if language.tag() == "en" else built(results)


def built(results: Results) -> str:
    """The sentence of `analysis.verdict` in the language that is spoken, from the numbers of the results."""
    tasks, old = (wording.changes_of(results, role) for role in ("task", "reference"))
    counted = [(info, change) for info, change in old if wording.is_share(info)]
    difference = results.verdict.difference if results.verdict else None
    parts = []
    if gains := [(1 if i.higher_is_better else -1) * c.difference.value for i, c in tasks if wording.is_share(i)]:
        mean = 100 * sum(gains) / len(gains)
        parts.append(say(f"sentence.{'learned' if mean > 0 else 'not_learned'}", points=f"{mean:+.3g}", n=len(gains)))
    elif tasks:
        parts.append(say("sentence.moved", moved=_moved(tasks)))
    if difference is not None:
        parts.append(_macro(difference, len(counted)))
    if apart := [pair for pair in old if pair not in counted]:
        moved = _moved(apart)
        parts.append(say("sentence.apart", moved=moved) if counted else moved)
    tally = [say("sentence.shown_kept", kept=sum(c.conclusion == "kept" for _, c in old), all=len(old))]
    for conclusion in ("lost", "gained", "cannot tell"):
        if names := [change.probe for _, change in old if change.conclusion == conclusion]:
            key = "sentence.cannot tell" if conclusion == "cannot tell" else f"conclusion.{conclusion}"
            tally.append(say("sentence.tally", word=say(key), names=wording.listed(names)))
    text = say("list.semicolon").join([*parts, say("list.clause").join(tally)]) + say("sentence.end")
    return text[0].upper() + text[1:]


def _macro(difference: Estimate, count: int) -> str:
    low, high = 100 * difference.low, 100 * difference.high
    if high < 0:
        points, interval = f"{-100 * difference.value:.2g}", f"[{-high:.2g}, {-low:.2g}]"
        return say("sentence.lost", points=points, interval=interval, n=count)
    if low > 0:
        points, interval = f"{100 * difference.value:.2g}", f"[{low:.2g}, {high:.2g}]"
        return say("sentence.gained", points=points, interval=interval, n=count)
    points, interval = f"{100 * difference.value:+.2g}", f"[{low:+.2g}, {high:+.2g}]"
    return say("sentence.unclear", points=points, interval=interval, n=count)


def _moved(pairs: list[tuple[ProbeInfo, Change]]) -> str:
    return say("list.comma").join(
        say(
            "sentence.moved_one",
            name=info.name,
            metric=language.name("metric", info.metric),
            before=f"{change.before.value:.3g}",
            after=f"{change.after.value:.3g}",
        )
        for info, change in pairs
    )
