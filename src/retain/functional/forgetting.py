"""Numbers for forgetting. Forgetting is positive when things got worse; every other delta is after − before.

Per item: `flips`, `sample_forgetting`. Per probe: `relative_drop`, `perplexity_increase`, `retention`,
`perplexity_retention`, `band`. Per sequence of tasks: `sequence_metrics`. Per run: `verdict_numbers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retain.errors import DataError

Band = Literal["excellent", "good", "fair", "poor"]


class Flips(NamedTuple):
    """Counts of items by right/wrong before and after."""

    lost: int  # n10
    gained: int  # n01
    kept_right: int  # n11
    kept_wrong: int  # n00

    @property
    def items(self) -> int:
        """n."""
        return sum(self)


class SampleForgetting(NamedTuple):
    """Shares of all items: lost (forgetting) and gained, by three estimators (`sample_forgetting`)."""

    raw: float
    adjusted: float
    paired: float
    raw_gain: float
    adjusted_gain: float
    paired_gain: float


class SequenceMetrics(NamedTuple):
    """Numbers of a task matrix; None where the sequence does not define them (`sequence_metrics`)."""

    accuracy: float | None
    incremental_accuracy: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    plasticity: float | None
    stability: float | None
    intransigence: float | None


class VerdictNumbers(NamedTuple):
    """A run in a few numbers (`verdict_numbers`)."""

    forgetting: float
    improvement: float
    improvement_score: float
    balance: float
    mean_reference: float
    stability_efficiency: float
    successful: bool


def flips(before: ArrayLike, after: ArrayLike) -> Flips:
    """Count items (n,) that were right (1) or wrong (0) before and after.

    Raises:
        DataError: lengths that differ, no items, or values other than 0 and 1.
    """
    b, a = _outcomes(before, after)
    return Flips(int((b & ~a).sum()), int((~b & a).sum()), int((b & a).sum()), int((~b & ~a).sum()))


def sample_forgetting(
    before: ArrayLike, after: ArrayLike, choices: ArrayLike | Sequence[int | None] | None = None
) -> SampleForgetting:
    """Share of items lost and gained: raw, chance-adjusted, and by the paired moment estimator.

    With n10 lost, n01 gained, n00 wrong twice, accuracies ā_b and ā_a, k options:

    - raw: n10/n. Counts a lucky guess that became an unlucky one as a loss.
    - adjusted: max(0, n10/n − (1−ā_b)(1−ā_a)/(k−1)), the chance correction of the sample-wise forgetting
      study (post-forget, ICLR 2026). Takes guesses as independent of which items are known, so it corrects
      too little where the same items stay unknown.
    - paired: k/(k−1) · (n10 − n00/(k−1))/n. Exact in expectation when a model knows or guesses afresh;
      a barely changed model repeats its guesses, and then this corrects too much and may be negative. It is
      not clipped, so that averages over probes stay unbiased.

    Items with different k are corrected within each k and added with weights n_k/n. Items without options
    (None or 0: free generation cannot be guessed) contribute their raw flips.

    Args:
        before, after: (n,) right (1) or wrong (0).
        choices: (n,) number of options of each item, or one number for all.

    Raises:
        DataError: as `flips`; or an item with exactly one option or fewer than none.
    """
    b, a = _outcomes(before, after)
    options = _options(choices, len(b))
    total = np.zeros(6)
    for k in np.unique(options):
        mine = options == k
        counts = flips(b[mine], a[mine])
        n = counts.items
        lost, gained, wrong = counts.lost / n, counts.gained / n, counts.kept_wrong / n
        numbers = [lost, lost, lost, gained, gained, gained]
        if k:
            chance = (1 - b[mine].mean()) * (1 - a[mine].mean()) / (k - 1)
            repeated = wrong / (k - 1)
            numbers[1:3] = max(0.0, lost - chance), k / (k - 1) * (lost - repeated)
            numbers[4:6] = max(0.0, gained - chance), k / (k - 1) * (gained - repeated)
        total += np.array(numbers) * n / len(b)
    return SampleForgetting(*map(float, total))


def paired_contributions(
    before: ArrayLike, after: ArrayLike, choices: ArrayLike | Sequence[int | None] | None = None
) -> NDArray[np.float64]:
    """What each item adds to the paired estimator, (n,): its mean is `sample_forgetting(...).paired`.

    For error bars: give it to `statistics.mean_interval`. Args and errors as `sample_forgetting`.
    """
    b, a = _outcomes(before, after)
    k = _options(choices, len(b)).astype(float)
    k[k == 0] = np.inf  # in the limit of many options a guess is never right, and raw flips are left
    with np.errstate(invalid="ignore"):
        scale = np.where(np.isinf(k), 1.0, k / (k - 1))
    return scale * ((b & ~a) - (~b & ~a) / (k - 1))


def relative_drop(before: float, after: float) -> float:
    """max(0, (before − after)/before) of a score where higher is better; 0 if there was nothing to lose."""
    return max(0.0, (before - after) / before) if before > 0 else 0.0


def perplexity_increase(before: float, after: float) -> float:
    """(after − before)/before of a perplexity; positive = worse, negative = better.

    Raises:
        DataError: a perplexity before that is not positive.
    """
    if before <= 0:
        raise DataError(f"perplexity_increase: perplexity {before} before. A perplexity is at least 1.")
    return (after - before) / before


def retention(before: float, after: float) -> float:
    """100·after/before in percent, from 0 to 100, of a score where higher is better; 100 if before ≤ 0."""
    return float(np.clip(100 * after / before, 0, 100)) if before > 0 else 100.0


def perplexity_retention(before: float, after: float) -> float:
    """100·max(0, 2 − after/before) in percent, capped at 100: a doubled perplexity retains nothing.

    Raises:
        DataError: a perplexity before that is not positive.
    """
    return 100 * float(np.clip(1 - perplexity_increase(before, after), 0, 1))


def band(percent: float) -> Band:
    """A word for a retention in percent: ≥ 90 excellent, ≥ 70 good, ≥ 50 fair, below poor."""
    if percent >= 90:
        return "excellent"
    if percent >= 70:
        return "good"
    return "fair" if percent >= 50 else "poor"


def sequence_metrics(
    matrix: Sequence[Sequence[float | None]], single_task: Sequence[float] | None = None
) -> SequenceMetrics:
    """Continual-learning numbers of R[i][j] = score on task j after training task i; row 0 = before training.

    With T tasks, columns 1…T, larger R better:

    - accuracy (ACC): (1/T) Σ_j R_{T,j}
    - incremental_accuracy (AAA): (1/T) Σ_i (1/i) Σ_{j≤i} R_{i,j}
    - backward_transfer (BWT): (1/(T−1)) Σ_{j<T} (R_{T,j} − R_{j,j}); negative = forgetting
    - forward_transfer (FWT, GEM 2017 with the zero-shot score as baseline):
      (1/(T−1)) Σ_{j≥2} (R_{j−1,j} − R_{0,j})
    - forgetting (Chaudhry 2018): (1/(T−1)) Σ_{j<T} max_{1≤i<T}(R_{i,j} − R_{T,j}), never less than −BWT; a
      cell of a task not yet trained counts where it was measured
    - plasticity: (1/T) Σ_j R_{j,j}
    - stability: (1/(T−1)) Σ_{j<T} R_{T,j}/R_{j,j}
    - intransigence: (1/T) Σ_j (R*_j − R_{j,j}), with R* the score of training on task j alone

    With one task, transfer, forgetting and stability are None: undefined is not 0. Stability is also None
    where a score R_{j,j} is not positive, FWT where the cells that it needs were not measured at all, and
    intransigence without `single_task`.

    Args:
        matrix: T+1 rows of T cells; None (or NaN) = not measured.
        single_task: T scores R*.

    Raises:
        DataError: a shape that is not (T+1, T), or a missing cell that a number needs.
    """
    table = _matrix(matrix)
    tasks = table.shape[1]
    if tasks == 0:
        return SequenceMetrics(*[None] * 8)
    trained = table[1:]
    lower = np.tril(np.ones((tasks, tasks), dtype=bool))
    _require(table, np.concatenate([np.zeros((1, tasks), dtype=bool), lower]))
    final, learned = trained[-1], trained.diagonal()
    steps = [float(trained[i, : i + 1].mean()) for i in range(tasks)]
    intransigence = None
    if single_task is not None:
        if len(single_task) != tasks:
            raise DataError(f"single_task: {len(single_task)} scores for {tasks} tasks. Give one for each.")
        intransigence = float(np.mean(np.asarray(single_task, dtype=float) - learned))
    backward = forward = forgetting = stability = None
    if tasks > 1:
        backward = float((final - learned)[:-1].mean())
        forgetting = float((np.nanmax(trained[:-1, :-1], axis=0) - final[:-1]).mean())
        if (learned[:-1] > 0).all():
            stability = float((final[:-1] / learned[:-1]).mean())
        forward = _forward_transfer(table)
    return SequenceMetrics(
        accuracy=float(final.mean()),
        incremental_accuracy=float(np.mean(steps)),
        backward_transfer=backward,
        forward_transfer=forward,
        forgetting=forgetting,
        plasticity=float(learned.mean()),
        stability=stability,
        intransigence=intransigence,
    )


def verdict_numbers(
    forgetting: Sequence[float],
    improvement: Sequence[float],
    reference_scores: Sequence[float],
    keep_weight: float = 0.6,
    learn_weight: float = 0.4,
    max_forgetting: float = 0.2,
    min_improvement: float = 0.1,
    min_reference: float = 0.7,
) -> VerdictNumbers:
    """One number for a run that learned something and lost something.

    - forgetting f: mean relative drop over the reference probes, each taken between 0 and 1, so that neither
      a perplexity that exploded nor one that improved decides alone
    - improvement g: mean relative gain over the task probes; 0 without any
    - improvement_score: s = min(1, 0.5 + g/2), not below 0
    - balance: keep_weight·(1 − f) + learn_weight·s
    - stability_efficiency: mean reference score · balance
    - successful: f < max_forgetting, g > min_improvement and mean reference score > min_reference

    Args:
        forgetting: one number per reference probe.
        improvement: one number per task probe.
        reference_scores: scores after training on the reference probes, in [0, 1].

    Raises:
        DataError: no reference probes.
    """
    if not len(forgetting) or not len(reference_scores):
        raise DataError("verdict: no reference probes. Add at least one probe of an old ability.")
    f = float(np.clip(forgetting, 0, 1).mean())
    g = float(np.mean(improvement)) if len(improvement) else 0.0
    score = float(np.clip(0.5 + g / 2, 0, 1))
    reference = float(np.mean(reference_scores))
    balance = keep_weight * (1 - f) + learn_weight * score
    successful = f < max_forgetting and g > min_improvement and reference > min_reference
    return VerdictNumbers(f, g, score, balance, reference, reference * balance, successful)


def _forward_transfer(table: NDArray[np.float64]) -> float | None:
    tasks = table.shape[1]
    later = np.arange(1, tasks)
    needed = np.zeros(table.shape, dtype=bool)
    needed[later, later] = needed[0, later] = True
    if np.isnan(table[later, later]).all() or np.isnan(table[0, later]).all():
        return None
    _require(table, needed)
    return float((table[later, later] - table[0, later]).mean())


def _require(table: NDArray[np.float64], needed: NDArray[np.bool_]) -> None:
    missing = np.argwhere(np.isnan(table) & needed)
    if len(missing):
        row, column = missing[0]
        raise DataError(
            f"task matrix: no score of task {column + 1} after task {row} (0 = base), {len(missing)} "
            "missing in all. Probe every task seen so far after every task; a missing score is not 0."
        )


def _matrix(matrix: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    widths = {len(row) for row in matrix}
    if len(widths) != 1 or len(matrix) != (width := widths.pop()) + 1:
        raise DataError(f"task matrix: {len(matrix)} rows. Give T+1 rows of T cells, row 0 = before training.")
    return np.array([[np.nan if cell is None else cell for cell in row] for row in matrix], dtype=float).reshape(
        width + 1, width
    )


def _outcomes(before: ArrayLike, after: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    b, a = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if b.shape != a.shape or b.ndim != 1 or not len(b) or not np.isin([b, a], (0, 1)).all():
        raise DataError(
            f"right/wrong items: shapes {b.shape} and {a.shape}. Give as many before as after, each 0 or 1."
        )
    return b.astype(bool), a.astype(bool)


def _options(choices: Any, items: int) -> NDArray[np.int64]:
    listed = [choices] * items if choices is None or np.ndim(choices) == 0 else list(choices)
    options = np.array([0 if k is None else k for k in listed], dtype=np.int64)
    if len(options) != items or ((options < 2) & (options != 0)).any():
        raise DataError(
            f"choices: {len(options)} for {items} items, fewest {options.min()}. Give each item's number of "
            "options (2 or more), None where there are none."
        )
    return options
