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
from retain.results import Change, Estimate, ProbeInfo, Results

Tone = Literal["good", "bad", "unknown"]

#: Words in the name of a metric that say that a score is not a share between 0 and 1.
_PLAIN = ("perplexity", "nats", "kl", "divergence", "length", "loss", "bits")

#: Fields of `results.Sequence`: plain name and what it says.
SEQUENCE_WORDS = {
    "accuracy": ("Average score", "mean score over all tasks after the last one"),
    "incremental_accuracy": ("Average on the way", "mean over stages of the average score so far"),
    "backward_transfer": (
        "Backward transfer",
        "change of earlier tasks by later ones; negative is forgetting",
    ),
    "forward_transfer": ("Forward transfer", "change of a task, before it was trained, by earlier ones"),
    "forgetting": ("Forgetting", "mean drop from the best score of each task; positive is worse"),
    "plasticity": ("Plasticity", "mean score of each task just after it was trained"),
    "stability": ("Stability", "how much of the earlier tasks is still there"),
    "intransigence": ("Intransigence", "how much less was learned than by training alone"),
}

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
    return f"{number(100 * value)} %" if is_share(info) else number(value, 2)


def score_interval(info: ProbeInfo, estimate: Estimate) -> str:
    """The interval of a score, without its unit: "[68.1, 76.4]"."""
    factor, digits = (100, 1) if is_share(info) else (1, 2)
    return f"[{number(factor * estimate.low, digits)}, {number(factor * estimate.high, digits)}]"


def unit(info: ProbeInfo) -> str:
    """Unit of a difference: percentage points, nats per token, or the unit of the metric itself."""
    if is_share(info):
        return "points"
    return "nats" if info.is_perplexity else info.metric


def difference(info: ProbeInfo, value: float | None, sign: bool = True) -> str:
    """A before/after difference without its unit: "−3.2" (points) or "+0.041" (nats)."""
    if value is None:
        return "–"
    return number(100 * value, 1, sign) if is_share(info) else number(value, 3, sign)


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
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, word: str) -> str:
    """ "1 probe", "3 probes"."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


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
        return BigNumber("Learned", "–", "", "nothing was trained, or no task probe", "unknown")
    conclusions = [change.conclusion for _, change in tasks]
    tone: Tone = "bad" if "lost" in conclusions else "good" if set(conclusions) == {"gained"} else "unknown"
    first = tasks[0][0]
    gains = [(info, _gain(info, change.difference)) for info, change in tasks if unit(info) == unit(first)]
    value = f"{difference(first, _mean([gain.value for _, gain in gains]))} {unit(first)}"
    percent = f"{100 * results.confidence:g} %"
    if len(gains) == 1:
        change = tasks[0][1]
        note = f"{first.name}: {score(first, change.before.value)} → {score(first, change.after.value)}"
        return BigNumber("Learned", value, f"{percent}: {difference_interval(*gains[0])}", note, tone)
    each = ", ".join(f"{info.name} {difference_interval(info, gain)}" for info, gain in gains)
    return BigNumber("Learned", value, f"{percent}: {each}", f"mean of {len(gains)} task probes", tone)


def _gain(info: ProbeInfo, change: Estimate) -> Estimate:
    """A difference with the sign turned where lower is better, so that positive means better."""
    if info.higher_is_better:
        return change
    return Estimate(value=-change.value, low=-change.high, high=-change.low)


def kept(results: Results) -> BigNumber:
    """`kept_share` in words, and how many reference probes say what."""
    references = changes_of(results, "reference")
    share = kept_share(results)
    if share is None:
        return BigNumber("Kept", "–", "", "no reference probes before and after", "unknown")
    found = [change.conclusion for _, change in references]
    tally = "; ".join(f"{found.count(word)} {word}" for word in CONCLUSION_TONE if word in found)
    note = f"{plural(len(references), 'reference probe')}: {tally}"
    ends = f"{100 * results.confidence:g} %: [{number(share.low)}, {number(share.high)}]"
    interval = ends if math.isfinite(share.low) else ""
    return BigNumber("Kept", f"{number(share.value)} %", interval, note, old_tone(results))


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
        return BigNumber("Lost", "–", "", "no change of old abilities was measured", "unknown")
    value = f"{number(-100 * macro.value)} points" if macro.value < 0 else "nothing"
    note = (
        "mean drop of old abilities" if macro.value < 0 else f"old abilities: {points(macro.value)} points on average"
    )
    note += "" if macro.high < 0 or macro.low > 0 else "; may be chance"
    interval = f"{100 * results.confidence:g} %: [{number(-100 * macro.high)}, {number(-100 * macro.low)}]"
    tone: Tone = "bad" if macro.high < 0 else "good" if macro.low >= -results.thresholds.margin else "unknown"
    return BigNumber("Lost", value, interval, note, tone)


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
    """A verdict of a few words and its colour."""
    if not results.changes:
        return "Measured; nothing trained", "unknown"
    gain, old = learned(results).tone, old_tone(results)
    has_tasks, has_old = bool(changes_of(results, "task")), bool(changes_of(results, "reference"))
    first = {"good": "Learned", "bad": "Got worse at the new task", "unknown": "No clear gain"}[gain]
    tasks = changes_of(results, "task")
    gained = sum(change.conclusion == "gained" for _, change in tasks)
    if gain == "unknown" and 0 < gained < len(tasks):
        first = f"Learned {gained} of {plural(len(tasks), 'task')}"
    if not has_old:
        return f"{first}; old abilities not measured", "bad" if gain == "bad" else "unknown"
    second = {
        "good": "kept what it could do",
        "bad": _loss_words(results),
        "unknown": "cannot tell what was lost",
    }[old]
    if not has_tasks:
        return second[0].upper() + second[1:], old
    tone: Tone = "bad" if "bad" in (gain, old) else "good" if (gain, old) == ("good", "good") else "unknown"
    joint = {"good": ", and ", "bad": ", but ", "unknown": "; "}[old] if gain == "good" else "; "
    return f"{first}{joint}{second}", tone


def _loss_words(results: Results) -> str:
    """How much was lost: points when the mean loss is beyond doubt, else how many probes say so."""
    macro = results.verdict.difference if results.verdict else None
    if macro is not None and macro.high < 0:
        return f"lost {number(-100 * macro.value)} points of what it could do"
    changes = [change for _, change in changes_of(results, "reference")]
    worse = sum(change.conclusion == "lost" for change in changes)
    return f"{worse} of {plural(len(changes), 'old probe')} got worse"


def sentence(results: Results) -> str:
    """The verdict sentence of the run, or what to say when there is none."""
    if results.verdict is not None:
        return results.verdict.sentence
    return f"The model was measured on {plural(len(results.probes), 'probe')}; nothing was trained, so nothing changed."


def progress(results: Results) -> str:
    """What a run has still to do: "so far, 2 of 4 tasks; still to learn: law, poems"; nothing for a finished one."""
    if results.finished:
        return ""
    done, total = len(results.tasks), len(results.tasks) + len(results.ahead)
    return f"so far, {done} of {plural(total, 'task')}; still to learn: {', '.join(results.ahead)}"


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
