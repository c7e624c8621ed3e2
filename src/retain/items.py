"""Item rows of one probe: read, put beside those of another stage, and measured.

Rows are those of `results.ITEM_COLUMNS`. Three kinds of probe are told apart:

- perplexity (`metric` is "perplexity"): compared as nats per token over the same tokens, documents resampled;
- scores between 0 and 1: compared as they are; where lower is better, relative numbers use 1 − score;
- other scores (lengths, divergences): compared as they are, and left out of means over probes. A divergence from the
  base (`metric` is "KL") is compared per token, as perplexity is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retain.errors import DataError, RunError
from retain.functional import flip_shares, statistics
from retain.functional import forgetting as measures
from retain.functional.flip_shares import Outcomes
from retain.results import Change, Estimate, ProbeInfo

Rows = Sequence[Mapping[str, Any]]
Array = NDArray[np.float64]
Kind = Literal["perplexity", "unit", "other"]


class Items(NamedTuple):
    """The items of one probe at one stage, in the order of the rows.

    `scores`, `tokens` and `right` have shape (n,). `right` is 1 where the answer was right, 0 where wrong, and
    None where items are not right or wrong; `options` is the number of choices of an item, where it has any.
    """

    ids: list[str]
    scores: Array
    tokens: Array
    right: Array | None
    options: list[int | None]


class Pair(NamedTuple):
    """One probe before and after, item by item in the same order; `difference` (n,) is after − before."""

    before: Items
    after: Items
    kind: Kind
    difference: Array
    weights: Array | None


class Measured(NamedTuple):
    """A change without its conclusion: `loss_bound` is the one-sided bound of the loss, in the unit of `margin`."""

    change: Change
    sign: int  # +1 where higher is better
    loss_bound: float
    margin: float


def score(rows: Rows, info: ProbeInfo, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """One probe at one stage, with its interval.

    Mean of the item scores (Wilson for 0/1, else bootstrap over items); for perplexity
    exp(Σ score / Σ tokens) with a bootstrap over documents, and for a divergence Σ score / Σ tokens.

    Args:
        rows: the rows of this probe at one stage.

    Raises:
        RunError: no rows, an item twice, a score that is no number, or too few items for an interval.
    """
    items = read(rows, info)
    try:
        if is_perplexity(info):
            interval = statistics.mean_interval(items.scores / items.tokens, confidence, items.tokens, seed=seed)
            return Estimate(**{name: math.exp(end) for name, end in interval._asdict().items()})
        if is_divergence(info):
            return estimate(statistics.mean_interval(items.scores / items.tokens, confidence, items.tokens, seed=seed))
        return estimate(statistics.mean_interval(items.scores, confidence, seed=seed))
    except DataError as error:
        raise RunError(f"probe '{info.name}': {error}") from error


def measure(
    before: Rows,
    after: Rows,
    info: ProbeInfo,
    confidence: float,
    seed: int,
    margin: float,
    margin_nats: float,
    tests: int = 1,
) -> Measured:
    """One probe, before against after; what its numbers are is told at `analysis.change`, which draws the conclusion.

    Args:
        tests: number of probes over which p will be adjusted. What is detectable is what shows at α/tests: that is
            what Holm asks of the smallest p, so of a change on this probe alone.

    Raises:
        RunError: as `align`, or too few items for an interval.
    """
    pair = align(before, after, info)
    try:
        interval, wide = (
            statistics.paired_interval(np.zeros(len(pair.difference)), pair.difference, level, pair.weights, seed=seed)
            for level in (confidence, 2 * confidence - 1)
        )
    except DataError as error:
        raise RunError(f"probe '{info.name}': {error}") from error
    sign = sign_of(info)
    start, end = score(before, info, confidence, seed), score(after, info, confidence, seed)
    lost, gained, kept = _counts(pair, sign)
    forgotten, retained = _relative(info, pair.kind, start.value, end.value)
    p = _p(pair, seed)
    shares = lost_shares([pair], confidence, seed)
    record = Change(
        probe=info.name,
        before=start,
        after=end,
        difference=estimate(interval),
        p=p,
        p_holm=p,
        lost=lost,
        gained=gained,
        kept=kept,
        items=len(pair.difference),
        forgetting=forgotten,
        retention=retained,
        band=measures.band(retained),
        detectable=statistics.detectable_difference(
            _variance(pair), len(pair.difference), 1 - (1 - confidence) / tests
        ),
        conclusion="cannot tell",
        **{name: found.value for name, found in shares.items()},
        intervals=shares,
    )
    bound = -wide.low if sign > 0 else wide.high
    return Measured(record, sign, bound, margin_nats if pair.kind == "perplexity" else margin)


def lost_shares(pairs: Sequence[Pair], confidence: float, seed: int) -> dict[str, Estimate]:
    """Mean share of items lost over the probes whose items are right or wrong, by the names of `Change`.

    `forgetting_raw`, and where items have options `forgetting_adjusted` and `forgetting_paired`; empty without such
    probes.
    """
    judged = [
        Outcomes(p.before.right, p.after.right, p.before.options)
        for p in pairs
        if p.before.right is not None and p.after.right is not None
    ]
    if not judged:
        return {}
    found = flip_shares.lost_shares(judged, confidence, seed)._asdict()
    guessable = any(any(p.choices) for p in judged)
    return {f"forgetting_{name}": estimate(value) for name, value in found.items() if guessable or name == "raw"}


def read(rows: Rows, info: ProbeInfo) -> Items:
    """The rows of one probe at one stage as arrays.

    Raises:
        RunError: no rows, an item twice, a score that is no number, or a text without scored tokens.
    """
    where = f"probe '{info.name}'"
    if not rows:
        raise RunError(f"{where}: no item rows. Run this probe at this stage.")
    ids = [str(row["item"]) for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise RunError(f"{where}: item '{twice}' appears twice. Give every item its own id.")
    scores = np.array([math.nan if row["score"] is None else row["score"] for row in rows], dtype=float)
    if not np.isfinite(scores).all():
        bad = ids[int(np.argmin(np.isfinite(scores)))]
        raise RunError(f"{where}: the score of item '{bad}' is not a finite number. Run this probe again.")
    tokens = np.array([row.get("tokens") or 0 for row in rows], dtype=float)
    if (is_perplexity(info) or is_divergence(info)) and (tokens <= 0).any():
        bad = ids[int(np.argmin(tokens))]
        raise RunError(f"{where}: item '{bad}' has no scored tokens. Leave out empty texts.")
    correct = [row.get("correct") for row in rows]
    right = None
    if all(flag is not None for flag in correct):
        right = np.array(correct, dtype=float)
    elif not (is_perplexity(info) or is_divergence(info)) and np.isin(scores, (0, 1)).all():
        right = scores if info.higher_is_better else 1 - scores
    return Items(ids, scores, tokens, right, [_choices(row.get("details")) for row in rows])


def _choices(details: Any) -> int | None:
    loaded = json.loads(details) if isinstance(details, str) and details else details
    options = loaded.get("choices") if isinstance(loaded, dict) else None
    options = len(options) if isinstance(options, list) else options
    return int(options) if options and options >= 2 else None


def align(before: Rows, after: Rows, info: ProbeInfo) -> Pair:
    """The same items before and after, in the order of `before`.

    Raises:
        RunError: the items (or, for perplexity, their tokens) differ before and after; or as `read`.
    """
    old = read(before, info)
    if old_only := {str(row["item"]) for row in before} ^ {str(row["item"]) for row in after}:
        raise RunError(
            f"probe '{info.name}': {len(old_only)} items are on one side only (first: '{min(old_only)}'). "
            "Before and after must ask the same items: probe both again with the same settings."
        )
    places = {str(row["item"]): row for row in after}
    if len(places) < len(after):
        read(after, info)  # names the item that appears twice
    new = read([places[item] for item in old.ids], info)
    if not (is_perplexity(info) or is_divergence(info)):
        inside = all(((t.scores >= 0) & (t.scores <= 1)).all() for t in (old, new))
        return Pair(old, new, "unit" if inside else "other", new.scores - old.scores, None)
    if (old.tokens != new.tokens).any():
        item = old.ids[int(np.argmax(old.tokens != new.tokens))]
        raise RunError(
            f"probe '{info.name}': item '{item}' has other tokens before and after. Perplexities of "
            "different tokenizers cannot be compared: use the tokenizer of the base."
        )
    kind: Kind = "perplexity" if is_perplexity(info) else "other"
    return Pair(old, new, kind, (new.scores - old.scores) / old.tokens, old.tokens)


def by_probe(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Probe → its rows, in the order in which they come."""
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["probe"], []).append(row)
    return tables


def _counts(pair: Pair, sign: int) -> tuple[int, int, int]:
    if pair.before.right is not None and pair.after.right is not None:
        return measures.flips(pair.before.right, pair.after.right)[:3]
    better = sign * pair.difference
    return int((better < 0).sum()), int((better > 0).sum()), int((better == 0).sum())


def _p(pair: Pair, seed: int) -> float:
    if _right_or_wrong(pair):
        return statistics.mcnemar(int((pair.difference < 0).sum()), int((pair.difference > 0).sum()))
    weights = 1.0 if pair.weights is None else pair.weights
    return statistics.sign_flip(pair.difference * weights, seed=seed)


def _right_or_wrong(pair: Pair) -> bool:
    return pair.weights is None and bool(np.isin([pair.before.scores, pair.after.scores], (0, 1)).all())


def _variance(pair: Pair) -> float:
    """Variance of one item's difference: ψ for right/wrong, never 0 because nothing happened to flip."""
    d = pair.difference
    if statistics.needs_padding(d, pair.weights):
        return float((np.sum(d**2) + 2) / (len(d) + 2))
    if pair.weights is None:
        return float(d.var(ddof=1))
    residual = pair.weights * (d - np.average(d, weights=pair.weights)) / pair.weights.mean()
    return float((residual**2).sum() / (len(d) - 1))


def _relative(info: ProbeInfo, kind: Kind, before: float, after: float) -> tuple[float, float]:
    """Forgetting relative to before, and retention in percent."""
    if kind == "perplexity":
        return measures.perplexity_increase(before, after), measures.perplexity_retention(before, after)
    if kind == "unit" or info.higher_is_better:
        b, a = goodness(info, before), goodness(info, after)
        return measures.relative_drop(b, a), measures.retention(b, a)
    # A divergence from the base is 0 before: a relative rise is undefined, so its own scale stands for it.
    worse = max(0.0, (after - before) / before if before > 0 else after - before)
    return worse, 100 * (1 - min(1.0, worse))


def goodness(info: ProbeInfo, value: float) -> float:
    """A score on a scale where larger is better."""
    if is_perplexity(info):
        return 1 / value
    return value if info.higher_is_better else 1 - value


def estimate(interval: statistics.Interval) -> Estimate:
    """The interval as it is written to `results.json`."""
    return Estimate(**interval._asdict())


def sign_of(info: ProbeInfo) -> int:
    """+1 where a larger item score is better, −1 where it is worse (perplexity: an item scores nats)."""
    return 1 if info.higher_is_better and not is_perplexity(info) else -1


def is_perplexity(info: ProbeInfo) -> bool:
    """Whether item scores are nats over `tokens` and the probe's score is exp of their mean per token."""
    return info.is_perplexity


def is_divergence(info: ProbeInfo) -> bool:
    """Whether item scores are nats of divergence from the base, summed over `tokens`: 0 for the base, by definition."""
    return info.metric == "KL"
