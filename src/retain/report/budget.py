"""What a forgetting budget came to, in words: met or not, at what price, and what would help."""

from __future__ import annotations

import math
from typing import NamedTuple

from retain.report import language, wording
from retain.report.language import say
from retain.report.wording import Tone
from retain.results import Budget, BudgetPoint, Estimate, ProbeInfo, Results


class Said(NamedTuple):
    """The budget of one task in a sentence or two, and whether it was met."""

    words: str
    met: bool


class Block(NamedTuple):
    """The budget of one task: what came out, numbers (name, value, interval, meaning), all points, what would help."""

    task: str
    words: str
    tone: Tone
    numbers: list[tuple[str, str, str, str]]
    heads: list[str]
    points: list[list[str]]
    advice: list[str]


def missed(results: Results) -> str:
    """One line about the budgets that were not met, with what would help; "" where all were."""
    found = [budget for budget in results.budgets if not budget.feasible]
    if not found:
        return ""
    help_ = list(dict.fromkeys(_sentence(line) for budget in found for line in budget.advice))
    advice = say("budget.helps_line", advice=say("sentence.between").join(help_)) if help_ else ""
    names = wording.listed([budget.task for budget in found])
    return say("budget.missed", names=names, limit=_limit(found[0]), advice=advice)


def sentences(results: Results) -> list[Said]:
    """Every task's budget in a sentence or two."""
    return [Said(say("budget.of_task", task=b.task, words=_words(b)), b.feasible) for b in results.budgets]


def blocks(results: Results) -> list[Block]:
    """All there is to say about every task's budget."""
    return [_block(results, budget) for budget in results.budgets]


def chosen(budget: Budget) -> BudgetPoint | None:
    """The point that was gone to."""
    near = sorted(budget.points, key=lambda point: abs(point.share - budget.share))
    return near[0] if near and abs(near[0].share - budget.share) < 1e-6 else None


def _block(results: Results, budget: Budget) -> Block:
    points = sorted(budget.points, key=lambda point: point.share)
    columns = [say(f"budget.{key}") for key in ("share", "lost", "bound", "fits")]
    rows = [[_share(p.share), _points_of(p.loss), _amount(p.upper), _fits(p)] for p in points]
    if any(p.nats is not None for p in points):
        columns[3:3] = [say("budget.lost_nats"), say("budget.bound")]
        for row, point in zip(rows, points):
            row[3:3] = [_nats(point.nats), _nats(point.upper_nats)]
    if all(p.loss is None for p in points):
        columns[1:3], rows = [], [[row[0], *row[3:]] for row in rows]
    tone: Tone = "good" if budget.feasible else "bad"
    advice = [_sentence(line) for line in budget.advice]
    words = _words(budget)
    return Block(budget.task, words[0].upper() + words[1:], tone, _numbers(results, budget), columns, rows, advice)


def _numbers(results: Results, budget: Budget) -> list[tuple[str, str, str, str]]:
    percent = wording.percent(f"{100 * budget.confidence:g}")
    infos = [info for info in results.probes if info.name in budget.probes]
    own = [info for info in results.probes if info.task == budget.task]
    shares = [info for info in own if wording.is_share(info)]  # as `training.control` takes the mean
    unit = next(iter([*shares, *own]), None)
    limits = [_limit(budget)] if not infos or any(not info.is_perplexity for info in infos) else []
    limits += [_nats(budget.lose_at_most_nats)] if any(info.is_perplexity for info in infos) else []
    about = say("budget.allowed_means", items=budget.items, names=wording.listed(budget.probes))
    found = [(say("budget.allowed"), say("list.semicolon").join(limits), "", about)]
    here = chosen(budget)
    if here is not None and here.loss is not None:
        ends = f"[{wording.number(100 * here.loss.low)}, {wording.number(100 * here.loss.high)}]"
        bound = say("budget.at_most", bound=_amount(here.upper))
        meaning = say("budget.lost_means", percent=percent)
        found.append((say("budget.lost"), _points_of(here.loss), f"{ends}{say('list.semicolon')}{bound}", meaning))
    if here is not None and here.nats is not None:
        bound = say("budget.at_most", bound=_nats(here.upper_nats))
        meaning = say("budget.lost_means", percent=percent)
        found.append((say("budget.lost_nats"), _nats(here.nats), bound, meaning))
    found.append((say("budget.share"), _share(budget.share), "", say("budget.share_means")))
    if budget.learned is not None:
        found.append((say("budget.learned"), _gain(budget.learned, unit), "", _price(budget, unit)))
    if budget.drift is not None:
        found.append((say("budget.drift"), _nats(budget.drift), "", _thermostat(budget)))
    if budget.items_needed is not None:
        found.append((say("budget.needed"), f"{budget.items_needed:,}", "", say("budget.needed_means")))
    return found


def _words(budget: Budget) -> str:
    """Met or not, and why."""
    between = say("sentence.between")
    if not budget.feasible:
        tried = [point for point in budget.points if point.share > 0]
        least = min(tried, key=lambda point: point.share) if tried else None
        why = "" if least is None else between + _why_not(budget, least)
        return say("budget.none") + why
    here = chosen(budget)
    step = say("budget.whole") if budget.share > 1 - 1e-9 else say("budget.part", share=_share(budget.share))
    return step + ("" if here is None else between + _bound(budget, here))


def _bound(budget: Budget, point: BudgetPoint) -> str:
    said = {"percent": wording.percent(f"{100 * budget.confidence:g}"), "limit": _limit(budget)}
    if point.upper is None:
        said["limit"] = _nats(budget.lose_at_most_nats)
        return say("budget.sure", upper=_nats(point.upper_nats), **said)
    return say("budget.sure_nothing" if point.upper <= 0 else "budget.sure", upper=_amount(point.upper), **said)


def _why_not(budget: Budget, point: BudgetPoint) -> str:
    share, over = _share(point.share), point.upper is not None and point.upper > budget.lose_at_most
    if over or point.upper_nats is None:
        return say("budget.least", share=share, upper=_amount(point.upper), limit=_limit(budget))
    return say("budget.least", share=share, upper=_nats(point.upper_nats), limit=_nats(budget.lose_at_most_nats))


def _price(budget: Budget, info: ProbeInfo | None = None) -> str:
    if budget.learned is None or budget.learned_without is None or budget.share == 1:
        return say("budget.learned_means")
    price = budget.learned_without - budget.learned
    key = "budget.price" if price > 5e-4 else "budget.no_price"
    return say(key, without=_gain(budget.learned_without, info), price=_gain(price, info, sign=False))


def _thermostat(budget: Budget) -> str:
    parts = [] if budget.drift_limit is None else [say("budget.drift_limit", limit=_nats(budget.drift_limit))]
    parts.append(say("budget.factor", factor=f"{budget.factor:.3g}"))
    if budget.taken_back:
        parts.append(say("budget.taken_back", n=budget.taken_back))
    return say("list.semicolon").join(parts)


def _sentence(line: str) -> str:
    text = language.quoted(line).rstrip(".。").replace("`", "")
    return text[:1].upper() + text[1:] + say("sentence.end")


def _limit(budget: Budget) -> str:
    return say("budget.points", n=round(100 * budget.lose_at_most, 6))


def _amount(value: float | None) -> str:
    """A loss of a score in points: "0.8 points"."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{wording.number(100 * value)} {say('unit.points')}"


def _points_of(loss: Estimate | None) -> str:
    return _amount(None if loss is None else loss.value)


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{wording.number(value, 3)} {say('unit.nats_token')}"


def _gain(value: float, info: ProbeInfo | None = None, sign: bool = True) -> str:
    """Of the task's own probes: in points where they are scored from 0 to 1, else in the unit of the first."""
    if info is None:
        return f"{wording.number(100 * value, 1, sign)} {say('unit.points')}"
    return f"{wording.difference(info, value, sign)} {wording.unit(info)}"


def _share(value: float) -> str:
    return wording.percent(f"{100 * value:.3g}")


def _fits(point: BudgetPoint) -> str:
    return say("budget.inside" if point.inside else "budget.outside")
