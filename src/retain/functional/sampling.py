"""Which rows a model sees: schedules of the replay fraction, a reservoir, and the mixture of one epoch.

Everything is a pure function of its arguments (the reservoir carries a JSON-able state), so that a run that
is continued, or one with another number of processes, sees the same rows.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from retain.errors import ConfigError, DataError, unknown
from retain.functional.pacing import Fraction, checked, progress
from retain.functional.sources import Sources, draws, odds

#: kind → default start and end; None: constant has no end, linear ends at 20 % of its start.
SCHEDULES: dict[str, tuple[float | None, float | None]] = {
    "constant": (None, None),
    "linear": (0.2, None),
    "cosine": (0.3, 0.1),
    "rising": (0.15, 0.30),
    "warmup": (0.1, None),
    "annealed": (0.1, None),
    "custom": (None, None),
}
#: Part of the training that a warm-up takes, or in which all replay of an annealed schedule is.
PART = 0.2
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "sin": math.sin, "cos": math.cos, "exp": math.exp, "sqrt": math.sqrt
}  # fmt: skip
_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: math.pow,
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: a,
}
_NEW, _WINDOW = 0, 2  # streams of random numbers; `sources.STREAM` is another


def schedule(
    kind: str,
    start: float | None = None,
    end: float | None = None,
    expression: str | None = None,
    below: float = 1.0,
    part: float | None = None,
) -> Fraction:
    """The replay fraction, or another number, as a function of progress t in [0, 1].

    constant: start. linear, rising: start + (end − start) t. cosine: end + (start − end)(1 + cos πt)/2.
    warmup: start · min(1, t/part). annealed: start/part in the last `part`, before that 0: the mean is start.
    custom: an expression of `t`, see `parse_expression`; checked at 1001 points.

    Args:
        kind: a key of `SCHEDULES`, which also holds the defaults.
        start, end: fractions in [0, 1), or numbers in [0, below).
        expression: for "custom" only.
        below: what no value may reach; infinity for numbers that are no fractions.
        part: in (0, 1], for "warmup" and "annealed" only; default `PART`.

    Raises:
        ConfigError: unknown kind, a missing or superfluous number, one outside [0, below), or a bad expression.
    """
    if kind not in SCHEDULES:
        raise ConfigError(unknown("schedule", str(kind), SCHEDULES))
    if (expression is not None) != (kind == "custom"):
        raise ConfigError(f"schedule: '{kind}' with expression {expression!r}; an expression goes with 'custom' only.")
    if part is not None and (kind not in ("warmup", "annealed") or not 0 < part <= 1):
        raise ConfigError(
            f"schedule: '{kind}' with part {part:g}; a part goes with 'warmup' and 'annealed', above 0 and at most 1."
        )
    if kind == "custom":
        if start is not None or end is not None:
            raise ConfigError("schedule: 'custom' takes no start and no end; write them into the expression.")
        value = parse_expression(str(expression))
        for i in range(1001):
            checked(value(i / 1000), i / 1000, below)
        return value
    low, high = SCHEDULES[kind]
    first = low if start is None else start
    if first is None or (kind == "constant" and end is not None):
        raise ConfigError("schedule: 'constant' takes a start (the fraction) and no end.")
    checked(first, 0.0, below)
    if kind == "constant":
        return lambda t: first
    if kind in ("warmup", "annealed"):
        return _in_part(kind, first, end, PART if part is None else part)
    last = end if end is not None else (0.2 * first if high is None else high)
    checked(last, 1.0, below)
    if kind == "cosine":
        return lambda t: last + (first - last) * (1 + math.cos(math.pi * t)) / 2
    return lambda t: first + (last - first) * t


def _in_part(kind: str, reached: float, end: float | None, part: float) -> Fraction:
    if end is not None:
        raise ConfigError(f"schedule: '{kind}' takes no end; give the fraction and `part`.")
    if kind == "warmup":
        return lambda t: reached * min(1.0, t / part)
    if reached >= part:
        raise ConfigError(
            f"schedule: a fraction of {reached:g} does not fit into the last {part:g} of the training. Raise `part` "
            f"above {reached:g}, or lower the fraction."
        )
    return lambda t: reached / part if t >= 1 - part else 0.0


def parse_expression(text: str) -> Fraction:
    """Arithmetic in `t` and `pi` with + − * / ** and min max sin cos exp sqrt; nothing else is evaluated.

    Raises:
        ConfigError: with the position, for anything else; when called, for a division by zero and the like.
    """
    text = text.strip()
    if len(text) > 300:
        raise ConfigError(f"schedule: an expression of {len(text)} characters; allowed: 300.")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        place = getattr(error, "offset", None) or len(text) + 1  # no offset: it ends too early
        raise ConfigError(f"schedule: '{text}' is not an expression (character {place}).") from error
    _check_expression(tree, text)

    def value(t: float) -> float:
        try:
            return float(_evaluate(tree, {"t": float(t), "pi": math.pi}))
        except (ArithmeticError, ValueError) as error:
            raise ConfigError(f"schedule: '{text}' cannot be computed at t = {t} ({error}).") from error

    return value


def _check_expression(node: ast.expr, text: str) -> None:
    problem: str | None = None
    children: list[ast.expr] = []
    if isinstance(node, ast.Constant):
        problem = None if type(node.value) in (int, float) else f"{node.value!r}"
    elif isinstance(node, ast.Name):
        problem = None if node.id in ("t", "pi") else f"'{node.id}'"
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        children = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        children = [node.operand]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        children = node.args
        right = len(children) >= 2 if node.func.id in ("min", "max") else len(children) == 1
        if node.keywords or not right:
            problem = f"the number of arguments of {node.func.id}"
    else:
        problem = f"'{ast.unparse(node)}'"
    if problem is not None:
        raise ConfigError(
            f"schedule: {problem} at character {node.col_offset + 1} of '{text}'; allowed: numbers, t, pi, "
            f"+ - * / ** and {', '.join(_FUNCTIONS)}."
        )
    for child in children:
        _check_expression(child, text)


def _evaluate(node: Any, names: dict[str, float]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Call):
        return _FUNCTIONS[node.func.id](*(_evaluate(a, names) for a in node.args))  # type: ignore[attr-defined]
    inside = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
    return _OPERATORS[type(node.op)](*(_evaluate(child, names) for child in inside))


class Reservoir:
    """A uniform sample of fixed size from a stream of unknown length (Vitter 1985, algorithm R).

    Item i (from 1) enters with probability M / i and then replaces a slot chosen uniformly.

    Args:
        capacity: M ≥ 1, the number of slots.
        seed: seed of its own random numbers.

    Raises:
        ConfigError: capacity below 1.
    """

    def __init__(self, capacity: int, seed: int = 0):
        if capacity < 1:
            raise ConfigError(f"reservoir.capacity: {capacity} given; allowed: at least 1.")
        self.capacity, self.seen = capacity, 0
        self._random = np.random.default_rng(seed)

    def offer(self) -> int | None:
        """Slot in [0, M) to which the next item of the stream is written, or None if it is not kept."""
        self.seen += 1
        if self.seen <= self.capacity:
            return self.seen - 1
        slot = int(self._random.integers(self.seen))
        return slot if slot < self.capacity else None

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, as JSON types."""
        return {"capacity": self.capacity, "seen": self.seen, "random": self._random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.capacity, self.seen = int(state["capacity"]), int(state["seen"])
        self._random.bit_generator.state = state["random"]


def new_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the new rows of an epoch, whatever is replayed: `default_rng([seed, epoch, 0])` shuffles."""
    return np.random.default_rng([seed, epoch, _NEW]).permutation(count)


def mix(
    new_lengths: Sequence[int] | np.ndarray,
    replay_lengths: Sequence[int] | np.ndarray,
    fraction: Fraction,
    *,
    seed: int,
    epoch: int = 0,
    epochs: float = 1,
    window: int = 1,
    by: Literal["rows", "tokens"] = "rows",
    sources: Sources | None = None,
) -> np.ndarray:
    """Row indices of one epoch: new rows are 0 … N−1, replay row j is N + j.

    Each new row of weight w at progress t owes w f(t) / (1 − f(t)) of replay; a replay row follows as soon as
    half of its own weight is owed. So after every new row the replay so far differs from what is owed by at
    most half a replay row, across epochs. t counts rows shown over all epochs, see `progress`. Each new row comes
    once per epoch, in `new_order`; replay rows are those of `draws`: random passes over each source, each row once
    per pass, going on from epoch to epoch. Last, rows are shuffled within windows (the global batch), so that
    every optimizer step has its share; windows without replay stay as they are, hence a fraction of 0 gives
    `new_order` itself.

    Args:
        new_lengths, replay_lengths: [N] and [M] supervised tokens of each row (only the counts matter for
            by="rows").
        fraction: f, values in [0, 1).
        seed: any non-negative integer.
        epoch, epochs: which of how many; the last need not be whole.
        window: rows per optimizer step.
        by: what the fraction counts, "rows" or supervised "tokens".
        sources: of the replay rows, with their shares; default: one source.

    Returns:
        int64 [rows of this epoch]. Costs O((epoch + 1) · rows).

    Raises:
        ConfigError: a number out of range, or replay wanted from an empty buffer.
        DataError: by="tokens" and a replay row without supervised tokens.
    """
    if by not in ("rows", "tokens"):
        raise ConfigError(unknown("replay.by", str(by), ("rows", "tokens")))
    if not 0 <= epoch < epochs or window < 1 or seed < 0:
        raise ConfigError(
            f"replay: epoch {epoch} of {epochs}, window {window}, seed {seed} given; allowed: 0 ≤ epoch < "
            "epochs, window ≥ 1, seed ≥ 0."
        )
    count, buffer = len(new_lengths), len(replay_lengths)
    if by == "tokens":
        new_weight, replay_weight = np.asarray(new_lengths, float), np.asarray(replay_lengths, float)
        if buffer and replay_weight.min() <= 0:
            row = int(replay_weight.argmin())
            raise DataError(f"replay: row {row} of the buffer has no supervised token; remove it or count by rows.")
    else:
        new_weight, replay_weight = np.ones(count), np.ones(buffer)

    so_far = range(epoch + 1)
    done = np.minimum(np.arange(count * (epoch + 1)) / max(1, count * epochs), 1.0)
    steps = progress(fraction, done, odds(new_weight, replay_weight, sources))
    shares = np.fromiter((checked(fraction(t), t) for t in steps.tolist()), float, len(steps))
    order = new_order(count, seed, epoch)
    weights = np.concatenate([new_weight[new_order(count, seed, e)] for e in so_far])
    owed = np.cumsum(weights * shares / (1 - shares))
    if len(owed) == 0 or owed[-1] <= 0:
        return order
    if buffer == 0:
        raise ConfigError("replay: the buffer is empty; give old rows, or set the fraction to 0.")

    drawn = draws(replay_weight, float(owed[-1]), seed, sources)
    paid = replay_weight[drawn]
    due = np.cumsum(paid) - paid / 2  # replay row k comes once this much is owed
    after = np.searchsorted(due, owed, side="right")  # replay rows drawn up to and including each new row
    first, here = (after[epoch * count - 1] if epoch else 0), after[epoch * count :]
    rows = np.insert(
        order,
        np.repeat(np.arange(1, count + 1), np.diff(here, prepend=first)),
        count + drawn[first : here[-1]],
    )
    return shuffled(rows, count, window, seed, epoch)


def shuffled(rows: np.ndarray, count: int, window: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Rows shuffled within windows that hold replay rows (`count` and above)."""
    rows = rows.copy()
    for number, begin in enumerate(range(0, len(rows), window) if window > 1 else ()):
        part = rows[begin : begin + window]
        if (part >= count).any():
            rows[begin : begin + window] = np.random.default_rng([seed, epoch, number, _WINDOW]).permutation(part)
    return rows
