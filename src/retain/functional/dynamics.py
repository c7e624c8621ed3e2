"""How forgetting grows while training: simulated from settings, fitted to the looks of a run, forecast at a later step.

Two laws. F is forgetting, positive = worse, 0 before training, in any unit (a share, points, nats); s counts optimizer
steps, P trainable parameters:

- "saturating": F(s) = ceiling · (1 − exp(−s/constant)). Ours.
- "power": F(s, P) = scale · s^β · P^α, the form in which forgetting of pretraining data was found to grow with the
  amount of new data (Bethune 2025, arXiv:2502.06042), with trainable parameters in the place of all parameters.
  Kalajdzievski 2024 (arXiv:2401.05605) has a shifted power law in s and P, s − c[(a/P)^α + (b/N)^β]^ρ: seven constants,
  which the looks of one run cannot tell apart, and no zero before training. Over the few decades of one run
  the two forms are alike.

What is *not* in them: a learning rate that changes, a new task, data that repeat. A fit describes the run it was made
of, and a forecast says what happens if that run goes on as it did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from retain.errors import DataError

Law = Literal["saturating", "power"]
Array = NDArray[np.float64]

LAWS: tuple[Law, ...] = get_args(Law)
#: Share lost in one pass over unrelated data by a model that is fully sensitive. A guess: take your own from a run.
BASE_RATE = 0.1
#: Of more than this many times the last step fitted, a forecast says little.
FAR = 10
#: Points of grids along each constant of a shape, for shapes of one and of two: starts, everywhere, around the fit.
_STARTS, _COARSE, _FINE = (41, 21), (401, 61), (401, 81)
_REACH = 2.5  # how far beyond the linear interval of the shape the fine grid goes


def sensitivity(parameters: float) -> float:
    """min(1, 1/√(parameters/10⁹)): how much of the base rate a model of this size feels.

    That larger models lose less was measured (Bethune 2025: up to 95 % of pretraining progress for small ones, about
    20 % for large ones; as told by others); the square root and the cap are ours.

    Raises:
        DataError: not a positive number.
    """
    _require("parameters", parameters, 0, math.inf, "a positive number")
    return min(1.0, 1 / math.sqrt(parameters / 1e9))


def loss_rate(
    parameters: float, intensity: float = 1.0, similarity: float = 0.0, base_rate: float = BASE_RATE
) -> float:
    """Share lost per epoch at the start: base_rate · intensity · (1 − similarity) · sensitivity(parameters). Ours.

    Args:
        parameters: of the whole model, in single parameters (7e9).
        intensity: how hard the weights are pushed, 1 = as usual; to first order it scales with the learning rate.
        similarity: of the new data to the old, 0 (unrelated) to 1 (the same: nothing is lost).
        base_rate: share lost per epoch at intensity 1 and similarity 0 by a model of at most 10⁹ parameters.

    Raises:
        DataError: a number outside its range.
    """
    _require("intensity", intensity, 0, math.inf, "0 or more", closed=True)
    _require("similarity", similarity, 0, 1, "0 to 1", closed=True)
    _require("base rate", base_rate, 0, math.inf, "0 or more", closed=True)
    return base_rate * intensity * (1 - similarity) * sensitivity(parameters)


def simulate(
    epochs: ArrayLike,
    parameters: float,
    intensity: float = 1.0,
    similarity: float = 0.0,
    base_rate: float = BASE_RATE,
    ceiling: float = 1.0,
) -> Array:
    """Share of old abilities lost after so many epochs, (n,):

        F(e) = ceiling · (1 − exp(−r·e/ceiling))
        r = base_rate · intensity · (1 − similarity) · min(1, 1/√(parameters/10⁹))

    The "saturating" law with its slope from `loss_rate`: at first r per epoch, never more than the ceiling. In steps:
    e = s / (steps per epoch). The form is ours; where each factor comes from stands at `sensitivity` and `loss_rate`.
    It compares settings; for numbers of a run of yours, `fit` that run.

    Args:
        epochs: (n,) passes over the new data, fractions allowed.
        ceiling: largest share that can be lost, at most 1: (score − chance)/score for a probe that can be guessed.

    Raises:
        DataError: a number outside its range.
    """
    passes = np.asarray(epochs, dtype=float)
    if not np.isfinite(passes).all() or (passes < 0).any():
        raise DataError("epochs: a negative number, or none. Give 0 or more.")
    _require("ceiling", ceiling, 0, 1, "above 0, at most 1")
    rate = loss_rate(parameters, intensity, similarity, base_rate)
    return np.asarray(-ceiling * np.expm1(-rate * passes / ceiling))


@dataclass(frozen=True)
class Fit:
    """A law with the constants that fit the looks of a run, and these looks (n,), those at step 0 left out.

    `scale` is the value of the curve at the last step fitted, at the geometric mean of the trainable parameters.
    `shape` is (log constant,) of "saturating", (β,) of "power", or (β, α) where trainable parameters differ.
    `spread` is the standard deviation of a look around the curve (of a look of average standard error).
    """

    law: Law
    scale: float
    shape: tuple[float, ...]
    spread: float
    steps: Array
    forgetting: Array
    weights: Array  # mean squared error of a look / its own
    trainable: Array

    @property
    def freedom(self) -> int:
        """Looks − constants."""
        return len(self.steps) - 1 - len(self.shape)

    @property
    def last(self) -> float:
        """The last step fitted."""
        return float(self.steps.max())

    def constants(self) -> dict[str, float]:
        """The constants by their names in the law.

        "saturating": ceiling, constant (steps), slope = ceiling/constant (per step, at the start). "power": scale
        (at step 1), step_exponent, and trainable_exponent where it was fitted.
        """
        if self.law == "saturating":
            constant = math.exp(self.shape[0])
            ceiling = self.scale / -math.expm1(-self.last / constant)
            return {"ceiling": ceiling, "constant": constant, "slope": ceiling / constant}
        names = ("step_exponent", "trainable_exponent")
        return {"scale": self.scale * self.last ** -self.shape[0], **dict(zip(names, self.shape))}

    def at(self, steps: ArrayLike, trainable: float | None = None) -> Array:
        """The curve at steps (n,)."""
        given = np.asarray(steps, dtype=float)
        relative = np.full(given.shape, _relative(trainable, self.trainable))
        return self.scale * _shape(self.law, given, relative, self.last, np.array([self.shape]))[0]


@dataclass(frozen=True)
class Forecast:
    """What a look at a step will show, in the unit of the looks fitted; `far`: too far from them to be trusted."""

    step: float
    value: float
    low: float
    high: float
    far: bool


def fit(
    steps: ArrayLike,
    forgetting: ArrayLike,
    error: ArrayLike | None = None,
    law: Law = "saturating",
    trainable: ArrayLike | None = None,
) -> Fit:
    """Weighted least squares, bounded (`scipy.optimize.least_squares`), from the best of a grid of starts.

    For a given shape the best scale is a closed form, so only the shape is searched (variable projection).
    Looks at step 0 say nothing, as every curve is 0 there, and are left out. Forgetting may be negative: a run
    that gains is fitted as well.

    Args:
        steps: (n,) optimizer steps at which the run was looked at.
        forgetting: (n,) how much was lost there.
        error: (n,) standard errors where looks differ in precision (other numbers of items). Only the ratios count, and
            the scatter is taken from the looks: those of one run ask the same items, so they scatter less around a
            curve than their standard errors say.
        trainable: (n,) trainable parameters of the run that a look belongs to ("power", looks of several runs).

    Raises:
        DataError: shapes that differ, numbers that are not finite, errors that are not positive, another law, or too
            few looks: two more than constants, at different steps.
    """
    if law not in LAWS:
        raise DataError(f"law: '{law}' given. Allowed: {', '.join(LAWS)}.")
    s, f = np.asarray(steps, dtype=float), np.asarray(forgetting, dtype=float)
    se = np.ones_like(s) if error is None else np.asarray(error, dtype=float)
    size = np.ones_like(s) if trainable is None else np.broadcast_to(np.asarray(trainable, dtype=float), s.shape)
    if s.ndim != 1 or not s.shape == f.shape == se.shape:
        raise DataError(f"looks: {s.shape} steps, {f.shape} losses, {se.shape} errors. Give one of each per look.")
    if not all(np.isfinite(column).all() for column in (s, f, se, size)) or (s < 0).any():
        raise DataError("looks: a step below 0, or a number that is not finite. Leave that look out.")
    if (se <= 0).any() or (size <= 0).any():
        raise DataError("looks: a standard error or a number of trainable parameters is not positive.")
    kept = s > 0
    s, f, se, size = s[kept], f[kept], se[kept], size[kept]
    several = law == "power" and len(np.unique(size)) > 1
    needed = 5 if several else 4
    if (found := len(np.unique(s))) < needed:
        raise DataError(
            f"looks: {found} after step 0. The law '{law}' needs at least {needed} at different steps; "
            "look more often, or train longer."
        )
    weights = (se**2).mean() / se**2
    relative = _relative(size, size)
    low, high = _bounds(law, s, several)
    last = s.max()

    root, size_of = np.sqrt(weights), float(np.abs(f).max()) or 1.0  # the solver's steps fit numbers of about 1

    def residuals(shapes: Array) -> Array:
        """(G, n) at the best scale of each shape."""
        h = _shape(law, s, relative, last, shapes)
        return np.asarray(root * (f - _best_scale(weights, h, f)[:, None] * h) / size_of)

    starts = _grid([np.linspace(a, b, _STARTS[len(low) - 1]) for a, b in zip(low, high)])
    start = starts[(residuals(starts) ** 2).sum(1).argmin()]
    best = optimize.least_squares(lambda x: residuals(x[None])[0], start, bounds=(low, high), xtol=1e-10, ftol=1e-10)
    scale = float(_best_scale(weights, _shape(law, s, relative, last, best.x[None]), f)[0])
    spread = size_of * math.sqrt(2 * best.cost / (len(s) - 1 - len(best.x)))
    shape = tuple(map(float, best.x))
    return Fit(law, scale, shape, spread, s, f, weights, size)


def forecast(found: Fit, step: float, confidence: float = 0.95, trainable: float | None = None) -> Forecast:
    """What a look at a step will show, with an interval that holds it with the given confidence under the law.

    The interval is the set of values y that, taken as one more look, raise the least sum of squares S by no more than
    t²·S/ν, t being Student's quantile at ν = `Fit.freedom` (the profile form, Bates & Watts 1988, ch. 6). For a curve
    that is linear in its constants this is the textbook prediction interval. Why not the delta method: early in a run
    the looks do not say whether the curve will bend, constants lie at their bounds, and a linear approximation there
    is far too sure. Why no bootstrap: it refits a thousand times and has the same trouble. Given the shape, the scale
    that fits best is a closed form, so the profile is searched on a grid over the shape: everywhere within the bounds,
    and finely around the fit. Its coverage is held by simulation in tests/functional/test_dynamics.py.

    It knows the scatter of looks around the curve and what the looks leave open, not whether the law is right.

    Args:
        step: a positive optimizer step; later than the last one fitted, or between.
        trainable: trainable parameters of the run asked about, where several runs were fitted.

    Raises:
        DataError: a step or a confidence outside its range.
    """
    _require("step", step, 0, math.inf, "above 0")
    if not 0 < confidence < 1:
        raise DataError(f"confidence: {confidence:g} given. Allowed: between 0 and 1.")
    shapes = _candidates(found, confidence)
    relative = _relative(found.trainable, found.trainable)
    h = _shape(found.law, found.steps, relative, found.last, shapes)  # [candidate, look]
    asked = np.array([_relative(trainable, found.trainable)]).reshape(1)
    there = _shape(found.law, np.array([float(step)]), asked, found.last, shapes)[:, 0]
    mass = (found.weights * h * h).sum(1)
    scale = _best_scale(found.weights, h, found.forgetting)
    squares = (found.weights * (found.forgetting - scale[:, None] * h) ** 2).sum(1)
    t = float(stats.t.ppf((1 + confidence) / 2, found.freedom))
    room = squares.min() * (1 + t**2 / found.freedom) - squares
    half = np.sqrt(np.maximum(room, 0) * (1 + there**2 / mass))
    low, high = ((scale * there + sign * half)[room >= 0] for sign in (-1, 1))
    value = float(found.at([step], trainable)[0])
    ends = min(value, float(low.min())), max(value, float(high.max()))
    return Forecast(float(step), value, *ends, far=step > FAR * found.last)


def _shape(law: Law, steps: Array, relative: Array, last: float, shapes: Array) -> Array:
    """Curves of the given shapes (G, d) at steps (n,), 1 at the last step: (G, n)."""
    first = shapes[:, :1]
    if law == "saturating":
        return np.expm1(-steps / np.exp(first)) / np.expm1(-last / np.exp(first))
    curve = (steps / last) ** first
    return curve * relative ** shapes[:, 1:] if shapes.shape[1] > 1 else curve


def _best_scale(weights: Array, h: Array, forgetting: Array) -> Array:
    """Least squares of each curve (G, n): (G,)."""
    return np.asarray((weights * h * forgetting).sum(1) / (weights * h * h).sum(1))


def _bounds(law: Law, steps: Array, several: bool) -> tuple[Array, Array]:
    """Of the shape: from a jump before the first look to a straight line; β from 0 to 3, α from −2 to 2."""
    if law == "saturating":
        return np.log([steps.min() / 10]), np.log([100 * steps.max()])
    return (np.array([0.0, -2.0]), np.array([3.0, 2.0])) if several else (np.array([0.0]), np.array([3.0]))


def _candidates(found: Fit, confidence: float) -> Array:
    """Shapes to try (G, d): a grid within the bounds, and one around the fit that follows its linear approximation."""
    best = np.array(found.shape)
    low, high = _bounds(found.law, found.steps, len(best) > 1)
    everywhere = _grid([np.linspace(a, b, _COARSE[len(best) - 1]) for a, b in zip(low, high)])
    relative = _relative(found.trainable, found.trainable)
    step = 1e-5
    moved = np.concatenate([best[None], best + step * np.eye(len(best))])
    h = np.sqrt(found.weights) * _shape(found.law, found.steps, relative, found.last, moved)
    jacobian = np.stack([h[0], *(found.scale * (h[1:] - h[0]) / step)], axis=1)
    covariance = found.spread**2 * np.linalg.pinv(jacobian.T @ jacobian)[1:, 1:]
    spread, directions = np.linalg.eigh(covariance)
    reach = _REACH * stats.t.ppf((1 + confidence) / 2, found.freedom) * np.sqrt(np.maximum(spread, 0))
    near = best + _grid([np.linspace(-r, r, _FINE[len(best) - 1]) for r in reach]) @ directions.T
    return np.concatenate([best[None], everywhere, np.clip(near, low, high)])


def _grid(axes: list[Array]) -> Array:
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)


def _relative(trainable: ArrayLike | None, all_of_them: Array) -> Array:
    """Trainable parameters over the geometric mean of those fitted; 1 where none are given."""
    if trainable is None:
        return np.ones(())
    return np.asarray(trainable, dtype=float) / math.exp(float(np.log(all_of_them).mean()))


def _require(name: str, value: float, low: float, high: float, allowed: str, closed: bool = False) -> None:
    inside = (low <= value if closed else low < value) and value <= high and math.isfinite(value)
    if not inside:
        raise DataError(f"{name}: {value:g} given. Allowed: {allowed}.")
