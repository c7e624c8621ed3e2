"""Numbers and verdicts in words: the one place that decides how a score, a change or a doubt is written.

Nothing is estimated here. Every interval comes from `results.json`; the only arithmetic is means over probes
and a change of unit (a share becomes a percentage, a change of the mean becomes a share of the mean before).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from retain.errors import RunError
from retain.functional.forgetting import retention
from retain.report import language
from retain.report.language import say
from retain.results import Change, Estimate, ProbeInfo, Results

Tone = Literal["good", "bad", "unknown"]

#: Words in the name of a metric that say that a score is not a share between 0 and 1.
_PLAIN = ("perplexity", "nats", "kl", "divergence", "length", "loss", "bits")

CONCLUSION_TONE: dict[str, Tone] = {"lost": "bad", "kept": "good", "gained": "good", "cannot tell": "unknown"}


@dataclass(frozen=True)
class BigNumber:
    """One of the three numbers on top: label, value with unit, interval in words, remark, colour."""

    label: str
    value: str
    interval: str
    note: str
    tone: Tone


def is_share(info: ProbeInfo) -> bool:
    """Whether the scores of a probe are shares between 0 and 1, written as percentages."""
    metric = info.metric.lower()
    words = metric.replace("_", " ").split()
    return not info.is_perplexity and not any(word in words for word in _PLAIN)


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A decimal with a true minus sign; "–" where there is no finite number."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def score(info: ProbeInfo, value: float | None) -> str:
    """A score: "72.5 %" for a share, "12.31" for a perplexity or another plain number."""
    if value is None or not math.isfinite(value):
        return "–"
    return percent(number(100 * value)) if is_share(info) else number(value, 2)


def percent(value: str) -> str:
    """A number with the percent sign, as the language sets it: "72.5 %"."""
    return say("unit.percent", value=value)


def confidence(results: Results) -> str:
    """The confidence of the intervals: "95 %"."""
    return percent(f"{100 * results.confidence:g}")


def score_interval(info: ProbeInfo, estimate: Estimate) -> str:
    """The interval of a score, without its unit: "[68.1, 76.4]"."""
    factor, digits = (100, 1) if is_share(info) else (1, 2)
    return f"[{number(factor * estimate.low, digits)}, {number(factor * estimate.high, digits)}]"


def unit(info: ProbeInfo) -> str:
    """Unit of a difference: percentage points, nats per token, or the unit of the metric itself."""
    if is_share(info):
        return say("unit.points")
    if info.kind == "perplexity" or info.is_perplexity:
        key = {"word_perplexity": "unit.nats_word", "byte_perplexity": "unit.nats_byte"}.get(info.metric, "unit.nats")
        return say(key)
    return language.name("metric", info.metric)


def difference(info: ProbeInfo, value: float | None, sign: bool = True) -> str:
    """A before/after difference without its unit: "−3.2" (points) or "+0.041" (nats)."""
    if value is None:
        return "–"
    return number(100 * value, 1, sign) if is_share(info) else number(value, 3, sign)


def detectable(info: ProbeInfo, change: Change) -> str:
    """The smallest change that the probe would have shown, with its unit; in words where no change is large enough."""
    if is_share(info) and change.detectable > 1:
        return say("probes.nothing_detectable")
    return f"{difference(info, change.detectable, sign=False)} {unit(info)}"


def difference_interval(info: ProbeInfo, estimate: Estimate) -> str:
    """The interval of a difference, without its unit: "[−5.0, −1.4]"."""
    return f"[{difference(info, estimate.low)}, {difference(info, estimate.high)}]"


def points(value: float) -> str:
    """A difference of shares in percentage points, signed: "−3.2"."""
    return number(100 * value, 1, True)


def probability(p: float) -> str:
    """A p value: "0.031", "< 0.001"."""
    if not math.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Seconds as "48 s", "12 min" or "3 h 05 min"."""
    if seconds < 120:
        return say("count.seconds", n=f"{seconds:.0f}")
    minutes = round(seconds / 60)
    if minutes < 120:
        return say("count.minutes", n=minutes)
    return say("count.hours", n=minutes // 60, minutes=minutes % 60)


def listed(names: Sequence[str], most: int = 4) -> str:
    """ "a, b, c, d and 2 more"."""
    more = say("list.more", n=len(names) - most) if len(names) > most else ""
    return say("list.comma").join(names[:most]) + more


def changes_of(results: Results, role: str) -> list[tuple[ProbeInfo, Change]]:
    """Probes of one role ("reference" or "task") with their change, in the order of the run."""
    found = {change.probe: change for change in results.changes}
    return [(info, found[info.name]) for info in results.probes if info.role == role and info.name in found]


def _tone(conclusions: Iterable[str]) -> Tone:
    seen = set(conclusions)
    if "lost" in seen:
        return "bad"
    return "good" if seen and seen <= {"kept", "gained"} else "unknown"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def learned(results: Results) -> BigNumber:
    """Mean gain on the task probes, positive = better; one task probe has its paired interval, several each its own."""
    tasks = [(info, change) for info, change in changes_of(results, "task") if is_share(info)]
    tasks = tasks or changes_of(results, "task")
    if not tasks:
        return BigNumber(say("big.learned"), "–", "", say("big.nothing_trained"), "unknown")
    conclusions = [change.conclusion for _, change in tasks]
    tone: Tone = "bad" if "lost" in conclusions else "good" if set(conclusions) == {"gained"} else "unknown"
    first = tasks[0][0]
    gains = [(info, gain(info, change.difference)) for info, change in tasks if unit(info) == unit(first)]
    value = f"{difference(first, _mean([found.value for _, found in gains]))} {unit(first)}"
    head = confidence(results) + say("list.colon")
    if len(gains) == 1:
        change = tasks[0][1]
        before, after = (score(first, found.value) for found in (change.before, change.after))
        note = f"{first.name}{say('list.colon')}{before} → {after}"
        return BigNumber(say("big.learned"), value, head + difference_interval(*gains[0]), note, tone)
    each = say("list.comma").join(f"{info.name} {difference_interval(info, found)}" for info, found in gains)
    return BigNumber(say("big.learned"), value, head + each, say("big.mean_of", n=len(gains)), tone)


def gain(info: ProbeInfo, change: Estimate) -> Estimate:
    """A difference with the sign turned where lower is better, so that positive means better."""
    if info.higher_is_better:
        return change
    return Estimate(value=-change.value, low=-change.high, high=-change.low)


def kept(results: Results) -> BigNumber:
    """`kept_share` in words, and how many reference probes say what."""
    references = changes_of(results, "reference")
    share = kept_share(results)
    if share is None:
        return BigNumber(say("big.kept"), "–", "", say("big.no_reference"), "unknown")
    found = [change.conclusion for _, change in references]
    tally = say("list.semicolon").join(
        say("count.concluded", n=found.count(word), word=language.name("conclusion", word))
        for word in CONCLUSION_TONE
        if word in found
    )
    note = say("count.reference_probes", n=len(references)) + say("list.colon") + tally
    ends = f"{confidence(results)}{say('list.colon')}[{number(share.low)}, {number(share.high)}]"
    interval = ends if math.isfinite(share.low) else ""
    return BigNumber(say("big.kept"), percent(number(share.value)), interval, note, old_tone(results))


def kept_share(results: Results) -> Estimate | None:
    """Mean score on the reference probes, after as a percentage of before (1 − score where lower is better), 0 to 100.

    The interval is that of the paired macro difference divided by the mean before, which is taken as fixed. What
    is better than before counts as kept whole, in both; `lost` shows by how much. Perplexities and other plain
    numbers are left out unless there is nothing else; then the interval is nan. None without reference probes.
    """
    references = changes_of(results, "reference")
    if not references:
        return None
    shares = [(info, c) for info, c in references if is_share(info)]
    before = _mean([_good(info, c.before.value) for info, c in shares]) if shares else 0.0
    if before <= 0:
        mean = _mean([min(100.0, max(0.0, c.retention)) for _, c in references])
        return Estimate(value=mean, low=math.nan, high=math.nan)
    after = _mean([_good(info, c.after.value) for info, c in shares])
    low = high = math.nan
    macro = results.verdict.difference if results.verdict else None
    if macro is not None and abs(after - before - macro.value) < 1e-6 + 1e-3 * before:
        low, high = (retention(before, before + bound) for bound in (macro.low, macro.high))
    return Estimate(value=retention(before, after), low=low, high=high)


def _good(info: ProbeInfo, share: float) -> float:
    return share if info.higher_is_better else 1 - share


def lost(results: Results) -> BigNumber:
    """Macro change over the reference probes as points lost, with its interval (positive = worse)."""
    macro = results.verdict.difference if results.verdict else None
    if macro is None:
        return BigNumber(say("big.lost"), "–", "", say("big.no_change"), "unknown")
    drop = macro.value < 0
    value = f"{number(-100 * macro.value)} {say('unit.points')}" if drop else say("big.nothing")
    note = say("big.mean_drop") if drop else say("big.mean_gain", points=points(macro.value))
    note += "" if macro.high < 0 or macro.low > 0 else say("big.may_be_chance")
    interval = f"{confidence(results)}{say('list.colon')}[{number(-100 * macro.high)}, {number(-100 * macro.low)}]"
    tone: Tone = "bad" if macro.high < 0 else "good" if macro.low >= -results.thresholds.margin else "unknown"
    return BigNumber(say("big.lost"), value, interval, note, tone)


def three(results: Results) -> list[BigNumber]:
    """The numbers on top of every report: learned, kept, lost."""
    return [learned(results), kept(results), lost(results)]


def old_tone(results: Results) -> Tone:
    """Whether old abilities were kept ("good"), lost ("bad"), or the data cannot tell ("unknown").

    Lost when any probe says so or the whole macro interval is below zero; kept when every probe says so, or
    when the macro interval excludes a loss of more than the margin of the run.
    """
    tone = _tone(change.conclusion for _, change in changes_of(results, "reference"))
    macro = results.verdict.difference if results.verdict else None
    if macro is None or tone == "bad":
        return tone
    if macro.high < 0:
        return "bad"
    return "good" if macro.low >= -results.thresholds.margin else tone


def headline(results: Results) -> tuple[str, Tone]:
    """A verdict of a few words and its colour; it names the old abilities that were lost in large part."""
    if not results.changes:
        return say("headline.measured"), "unknown"
    words, tone = _verdict(results)
    for key, names in zip(("headline.large", "headline.large_chance"), large_losses(results)):
        words = say(key, rest=words, names=listed(names, 3)) if names else words
    if any(not budget.feasible for budget in results.budgets):
        return say("headline.no_budget", rest=words), "bad"
    return words, tone


def large_losses(results: Results) -> tuple[list[str], list[str]]:
    """Old probes that dropped by more than the alarm of the run: those beyond chance, and those that may be chance."""
    large = results.verdict.lost_over_threshold if results.verdict else []
    shown = {change.probe for change in results.changes if change.conclusion == "lost"}
    return [name for name in large if name in shown], [name for name in large if name not in shown]


def _verdict(results: Results) -> tuple[str, Tone]:
    new, old = learned(results).tone, old_tone(results)
    has_tasks, has_old = bool(changes_of(results, "task")), bool(changes_of(results, "reference"))
    first = say({"good": "headline.learned", "bad": "headline.worse", "unknown": "headline.no_gain"}[new])
    tasks = changes_of(results, "task")
    gained = sum(change.conclusion == "gained" for _, change in tasks)
    if new == "unknown" and 0 < gained < len(tasks):
        first = say("headline.learned_some", done=gained, tasks=say("count.tasks", n=len(tasks)))
    if not has_old:
        return say("headline.no_old", first=first), "bad" if new == "bad" else "unknown"
    second = {"good": say("headline.kept"), "bad": _loss_words(results), "unknown": say("headline.cannot_tell")}[old]
    if not has_tasks:
        return second[0].upper() + second[1:], old
    tone: Tone = "bad" if "bad" in (new, old) else "good" if (new, old) == ("good", "good") else "unknown"
    joint = {"good": "and", "bad": "but", "unknown": "apart"}[old] if new == "good" else "apart"
    return say(f"headline.{joint}", first=first, second=second), tone


def _loss_words(results: Results) -> str:
    """How much was lost: points when the mean loss is beyond doubt, else how many probes say so."""
    macro = results.verdict.difference if results.verdict else None
    if macro is not None and macro.high < 0:
        return say("headline.lost_points", points=number(-100 * macro.value))
    changes = [change for _, change in changes_of(results, "reference")]
    worse = sum(change.conclusion == "lost" for change in changes)
    count = len(changes)
    return say("headline.lost_probes", worse=worse, all=count, probes=say("count.old_probes", n=count))


def sequence(results: Results) -> list[tuple[str, str, str]]:
    """Numbers of the task matrix that are defined: name, what it says, value."""
    values = results.sequence.model_dump()
    return [
        (say(f"sequence.{name}"), say(f"sequence.{name}_why"), number(value, 3))
        for name, value in values.items()
        if value is not None
    ]


def progress(results: Results) -> str:
    """What a run has still to do: "so far, 2 of 4 tasks; still to learn: law, poems"; nothing for a finished one."""
    if results.finished:
        return ""
    done, total = len(results.tasks), len(results.tasks) + len(results.ahead)
    names = say("list.comma").join(results.ahead)
    return say("sentence.progress", done=done, tasks=say("count.tasks", n=total), names=names)


def check_finished(results: Results) -> None:
    """Raise `RunError` for a run that has tasks to learn: its numbers are not those that it will have."""
    if not results.finished:
        raise RunError(
            f"compare: '{results.name}' is not finished ({progress(results)}). Run its command again to go on: "
            f"{results.command}"
        )


def check_comparable(mine: Results, other: Results) -> None:
    """Raise `RunError` unless the other run is finished and both start from the same model and ask the same probes."""
    check_finished(other)
    if mine.model != other.model:
        raise RunError(
            f"compare: '{other.name}' starts from {other.model}, '{mine.name}' from {mine.model}. "
            "Compare runs on the same base model."
        )
    sizes = {info.name: info.items for info in mine.probes}
    shared = {info.name for info in other.probes if sizes.get(info.name) == info.items}
    if not shared:
        raise RunError(
            f"compare: '{other.name}' and '{mine.name}' share no probe with the same items. "
            "Run both with the same `probes` setting."
        )
