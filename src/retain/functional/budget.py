"""How much was lost at most, how sure that is, and how hard to hold on: the mathematics of a forgetting budget.

Losses are before − after, so positive is worse; scores lie in [0, 1]. Drift is the divergence from the base, in nats
per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from retain.errors import ConfigError, DataError
from retain.functional import statistics

POWER = 0.8
#: Score lost per nat of drift before any was measured (`drift_limit`).
PRIOR = 0.5
_FURTHEST = 10.0  # one look cannot say that a nat costs more than so many times the prior, or less than a part of it
_MOST_ITEMS = 10**8


class LossBound(NamedTuple):
    """A mean loss, its two-sided interval, and its upper one-sided bound, all at the confidence asked for."""

    value: float
    low: float
    high: float
    upper: float


def loss_bound(before: ArrayLike, after: ArrayLike, strata: ArrayLike, confidence: float = 0.95) -> LossBound:
    """Unweighted mean over strata of each one's mean loss of score, and what it is at most.

    A score bound in the manner of Tango (1998, Stat. Med. 17:891): the smallest ε above the mean loss d̄ with
    (ε − d̄ − c·u) / SE(ε) = z. SE(ε) is what the standard error would be if the loss were ε in truth, so it is not zero
    where nothing changed: in stratum g the second moment is the mean of d² plus the lost share that is missing up to
    its part of ε, added as whole flips. That share is spread over the strata so that SE is largest: a loss may hide in
    the smallest probe. u is one flip in the smallest stratum and c = ½ − (z² − 1)/6, from Cornish and Fisher's
    expansion of a count with a continuity correction (0.2 at 95 %; never below 0). Without it one stratum gives the
    Tango-like closed form and z²/(n + z²) where nothing changed, and that is too near: 2.7/n, where the exact bound is
    3/n, and the truth is above it in 6.7 % of samples instead of 5 %.

    Where nothing changed, Student's t and the bootstrap have no width; this has, and with many changes it goes over
    into them (a little wider).

    Args:
        before, after: (n,) scores in [0, 1] of the same items, right or wrong or in between.
        strata: (n,) labels; the probe of each item.
        confidence: of the upper bound (one-sided), and of the interval (two-sided).

    Raises:
        DataError: no items, shapes that differ, scores that are not in [0, 1].
    """
    loss = _scores(before, "before") - _scores(after, "after")
    labels = np.asarray(strata)
    if labels.shape != loss.shape:
        raise DataError(f"loss_bound: {labels.shape} strata for {loss.shape} items. Give one label for each item.")
    _, where = np.unique(labels, return_inverse=True)
    counts = np.bincount(where).astype(float)
    means, squares = np.bincount(where, loss) / counts, np.bincount(where, loss**2) / counts
    high = upper_of(means, squares, counts, (1 + confidence) / 2)
    low = -upper_of(-means, squares, counts, (1 + confidence) / 2)
    return LossBound(float(means.mean()), low, high, upper_of(means, squares, counts, confidence))


def upper_of(means: ArrayLike, squares: ArrayLike, counts: ArrayLike, confidence: float) -> float:
    """The upper bound of `loss_bound` from what is known of each of G strata.

    Args:
        means: (G,) mean losses.
        squares: (G,) means of the squared losses.
        counts: (G,) items, not necessarily whole.
        confidence: one-sided.
    """
    means, squares, counts = (np.asarray(x, dtype=float) for x in (means, squares, counts))
    groups, z = len(means), float(stats.norm.ppf(confidence))
    step = max(0.0, 0.5 - (z * z - 1) / 6) / (groups * counts.min())
    value = float(means.mean())

    def at(price: float) -> tuple[float, float]:
        """The loss ε, and how far it is above the bound, where a share is added until its worth falls to `price`."""
        levels = np.clip((1 - price * counts) / 2, means, 1.0)
        spread = squares + (levels - means) - levels**2
        error = math.sqrt(max(0.0, float((spread / counts).sum()))) / groups
        loss = float(levels.mean())
        return loss, loss - value - step - z * error

    most, least = float(((1 - 2 * means) / counts).max()), -1 / float(counts.min())
    if most <= least or at(least)[1] <= 0:
        return 1.0
    found = optimize.brentq(lambda price: at(price)[1], least, most, xtol=1e-15, rtol=1e-13)
    return min(1.0, max(value, at(found)[0]))


def items_needed(
    limit: float,
    confidence: float = 0.95,
    discordance: float = 0.0,
    strata: Sequence[float] = (1.0,),
    power: float = POWER,
) -> int:
    """Items in all with which a loss of at most `limit` can be certified by `loss_bound`, where none is on average.

    Without discordance it is the hard floor: with fewer, not even answers that are all the same would be enough.

    Args:
        limit: of the mean loss over the strata.
        discordance: share of items whose score flips, as many gained as lost.
        strata: how the items are spread: sizes or shares of the strata. The more evenly, the fewer are needed.
        power: with what chance, where there is discordance.

    Raises:
        DataError: a limit or a discordance that is not possible.
    """
    if not 0 < limit < 1 or not 0 <= discordance <= 1:
        raise DataError(f"items_needed: limit {limit}, discordance {discordance}. Give shares, the limit above 0.")
    shares = np.asarray(strata, dtype=float)
    shares = shares / shares.sum()
    flips = np.full(len(shares), float(discordance))

    def enough(items: int) -> bool:
        counts = shares * items
        error = math.sqrt(float((flips / counts).sum())) / len(shares)
        unlucky = np.full(len(shares), min(float(stats.norm.ppf(power)) * error, discordance))
        return upper_of(unlucky, flips, counts, confidence) <= limit

    few, many = 0, 1
    while not enough(many):
        few, many = many, 2 * many
        if many > _MOST_ITEMS:
            return many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def require_items(limit: float, confidence: float, sizes: Sequence[int]) -> None:
    """Refuse a budget that probes of these sizes cannot certify, even if no answer changes.

    Args:
        limit: of the mean loss of score.
        sizes: items of each probe that scores between 0 and 1; none are always enough.

    Raises:
        ConfigError: with the number of items that is needed.
    """
    needed = items_needed(limit, confidence, strata=sizes) if len(sizes) else 0
    if needed <= sum(sizes):
        return
    even = items_needed(limit, confidence, strata=[1] * len(sizes))
    spread = f", or {even} if all probes are of one size" if even < needed else ""
    probes = "1 probe" if len(sizes) == 1 else f"{len(sizes)} probes"
    raise ConfigError(
        f"budget.lose_at_most: {sum(sizes)} items ({probes}) cannot show that at most {limit:.2%} is lost at "
        f"{confidence:.0%} confidence, even if no answer changes; {needed} are needed{spread}. Give more items "
        "(`budget.on`, `probes.limit`), or a looser budget."
    )


def items_to_show(
    means: ArrayLike, squares: ArrayLike, counts: ArrayLike, limit: float, confidence: float = 0.95
) -> int | None:
    """Items in all, spread as they are, with which the same losses would be inside the limit; None if never.

    Args: as `upper_of`; limit: of the mean loss.
    """
    sizes = np.asarray(counts, dtype=float)
    if float(np.asarray(means, dtype=float).mean()) >= limit:
        return None
    most = _MOST_ITEMS / sizes.sum()
    if upper_of(means, squares, sizes * most, confidence) > limit:
        return None
    times = optimize.brentq(
        lambda k: upper_of(means, squares, sizes * k, confidence) - limit, 1 / sizes.min(), most, xtol=1e-6
    )
    return math.ceil(times * sizes.sum())


def nats_bound(
    losses: Sequence[ArrayLike],
    weights: Sequence[ArrayLike | None] | None = None,
    confidence: float = 0.95,
    clusters: Sequence[ArrayLike | None] | None = None,
) -> LossBound:
    """Unweighted mean over probes of the loss in nats per token, by the paired bootstrap of `statistics`.

    Args:
        losses: of each probe (n,), by how many nats per token each text is worse than before.
        weights: of each probe (n,), the tokens of each text.
        clusters: of each probe (n,), what belongs together.

    Raises:
        DataError: as `statistics.macro_interval`.
    """
    both = statistics.macro_interval(losses, confidence, weights, clusters)
    one = statistics.macro_interval(losses, 2 * confidence - 1, weights, clusters)
    return LossBound(both.value, both.low, both.high, one.high)


class Dual(NamedTuple):
    """One multiplier on how strongly the methods hold on, by how far the drift is from its limit.

    factor ← clip(factor · exp(gain · clip(D/limit − 1, −1, 1)), least, most), D being the drift smoothed over looks.
    A dual update that has the same effect at every scale; on a convex problem it ends at the multiplier of Karush, Kuhn
    and Tucker. There is no other integral than the factor itself, and that is bounded, so nothing winds up while it is
    at a bound: it leaves the bound as soon as the smoothed drift is on the other side of the limit.

    The state is a dict that JSON can hold: `factor`, and `drift`, the smoothed one (None before the first look).
    """

    gain: float = 0.5
    least: float = 0.125
    most: float = 8.0
    smoothing: float = 0.5  # weight of what was before

    def begin(self) -> dict[str, Any]:
        """The state before the first look: a factor of 1, or the bound that is nearest to it."""
        return {"factor": min(max(1.0, self.least), self.most), "drift": None}

    def update(self, state: dict[str, Any], drift: float, limit: float) -> dict[str, Any]:
        """The state after a look."""
        before = state["drift"]
        smooth = drift if before is None else self.smoothing * before + (1 - self.smoothing) * drift
        push = min(1.0, max(-1.0, smooth / limit - 1))
        factor = state["factor"] * math.exp(self.gain * push)
        return {"factor": min(max(factor, self.least), self.most), "drift": smooth}


def drift_limit(limit: float, seen: Sequence[tuple[float, float, float]] = (), prior: float = PRIOR) -> float:
    """To what drift a loss of `limit` corresponds.

    Near the base both grow with the square of the distance, so loss ≈ c · drift. c is the mean of what the looks say
    (loss / drift), weighted by drift² as in least squares through the origin, together with the prior, which counts as
    much as one look at the drift that it allows. A look outside 1/10 to 10 times the prior counts as at that end: at a
    small drift loss / drift is mostly luck.

    Where more than the limit was surely lost, it is not luck, and the drift of these texts misses what is being lost.
    Then the limit is at most that look's drift · limit / (what was surely lost), whatever the mean says, until a later
    look finds a larger drift than that with no more lost than the limit.

    The prior: a nat per token takes the likelihood of a right answer down to e⁻¹ of itself, on average in the
    logarithm, and a score that is about one half in the mean falls by about half of a small drift: c = 0.5. For
    perplexity it is 1: on texts that the base wrote itself, the rise of the loss is the divergence.

    Args:
        limit: loss of score, or in nats per token.
        seen: (drift, loss, what was lost at least: the lower end of its interval) of looks at the probes, in order.
        prior: c before any look.
    """
    own = limit / prior
    least, most = prior / _FURTHEST, prior * _FURTHEST
    told = [(drift, min(max(loss / drift, least), most)) for drift, loss, _ in seen if drift > 0]
    weights = own**2 + sum(drift**2 for drift, _ in told)
    sure = math.inf
    for drift, loss, lost in seen:
        if lost > limit:
            sure = min(sure, drift * limit / lost)
        elif loss <= limit and drift > sure:
            sure = math.inf
    return min(sure, limit * weights / (own**2 * prior + sum(drift**2 * cost for drift, cost in told)))


class Point(Protocol):
    """What is known about one share of the way."""

    @property
    def inside(self) -> bool: ...


P = TypeVar("P", bound=Point)


def largest_inside(
    ask: Callable[[float], P], tries: int, guess: Callable[[P], float] = lambda end: 0.5
) -> tuple[float, list[P]]:
    """The largest share of the way from start to end that is found to be inside the budget, and all that was asked.

    Asks about 1 first. If that is outside: about a guess, then halves what is left between the largest that is inside
    (0 at first, which is never asked: the start) and the smallest that is not. A share above one that failed is
    therefore never chosen, nor asked about.

    Several shares are asked about with the same items, each at the full confidence. No correction is needed where the
    loss, in truth and as observed, rises with the share: the hypotheses "the loss at α is above the limit" are then
    nested, and the search returns what testing upwards from 0 until the first failure would (fixed-sequence testing;
    Maurer, Hothorn & Lehmacher 1995). That is wrong only if the first share in truth above the limit passed, which has
    the probability of one test.

    Args:
        ask: puts the probes to the model at a share.
        tries: most shares that are asked about.
        guess: the second share, from what 1 showed; kept between 1/20 and 19/20.

    Returns:
        The share, and the points in the order in which they were asked.
    """
    points = [ask(1.0)]
    if points[0].inside:
        return 1.0, points
    inside, outside = 0.0, 1.0
    share = min(max(guess(points[0]), 0.05), 0.95)
    while len(points) < tries:
        points.append(ask(share))
        inside, outside = (share, outside) if points[-1].inside else (inside, share)
        share = (inside + outside) / 2
    return inside, points


def _scores(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not len(found) or not ((found >= 0) & (found <= 1)).all():
        raise DataError(f"loss_bound: {name} is not a list of scores between 0 and 1. Give one for each item.")
    return found
