"""What each method of the registry costs: a step and the peak memory, against the same training without it.

A plain step is one forward and one backward pass, which costs two forward passes; from that follows what the extra
passes of a method should cost. `EXPECTED` holds it for the sizes of the examples at 8 rows a step; what takes more
than a quarter more than that is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from example_recipes import names_of, recipe, without
from side_by_side import WARM_UP, Settings, give_back, peak_bytes, ratio, steps_in_turn

from retain import methods

SLACK = 1.25
#: Step time against a plain step, and why.
EXPECTED: dict[str, tuple[float, str]] = {
    "agem": (2.0, "one more forward and backward pass, over 8 old rows"),
    "blocks": (1.0, "a quarter more layers; less than plain: the layers that were there have no gradient"),
    "bottleneck": (1.1, "two small matrices more per layer"),
    "der": (2.0, "two more passes, over 4 old rows each"),
    "dft": (1.0, "nothing: the loss has what it needs"),
    "distill": (4 / 3, "one more forward pass"),
    "eaft": (1.05, "the entropy of the supervised tokens"),
    "ewc": (1.05, "one sweep over the parameters"),
    "features": (1.5, "one more forward and backward pass, over 4 old rows"),
    "flow": (1.0, "nothing in a step: one forward pass before training"),
    "freeze": (1.0, "less than plain: the lower layers have no backward pass"),
    "hft": (1.0, "less than plain: half of the matrices have no gradient"),
    "ilora": (1.15, "two more forward passes, over the replayed fifth of the rows"),
    "interpolate": (1.0, "nothing in a step"),
    "key_layers": (4 / 3, "one more forward and backward pass, over 2 old rows, without the gradients of most layers"),
    "l2sp": (1.05, "one sweep over the parameters"),
    "label_smoothing": (1.05, "the mean log-probability of the supervised tokens"),
    "lora": (1.0, "less than plain: no gradient of the base weights"),
    "mas": (1.05, "one sweep over the parameters"),
    "mofo": (1.1, "a selection among the moments of every parameter"),
    "mtt": (4 / 3, "one more forward pass"),
    "ogd": (1.1, "no pass: two projections, which read the 64 directions of the factors B twice each"),
    "olora": (1.0, "products of r × r; in a first task none"),
    "packnet": (1.05, "a mask over the parameters"),
    "replay": (1.0, "nothing in a step: old rows take the places of new ones"),
    "sam": (2.0, "every batch forward and backward twice"),
    "shared_lora": (1.1, "wider factors"),
    "shield": (1.05, "a mask over the parameters"),
    "si": (1.05, "one sweep over the parameters"),
    "slao": (1.0, "nothing in a step: one factorisation per task"),
    "stm": (1.0, "nothing in a step: one forward pass before training"),
    "subspace": (1.1, "thin matrix products"),
    "unfreeze": (1.0, "less than plain while layers are frozen"),
}
HEAD = ("method", "against", "step", "range", "should be", "because", "memory", "verdict")


@dataclass(frozen=True)
class Cost:
    """What was measured of a method; ratios to the same training without it."""

    method: str
    against: str
    step: float
    low: float
    high: float
    memory: float
    detail: str
    problem: str = ""

    @property
    def verdict(self) -> str:
        """Whether a step takes what it should."""
        if self.problem:
            return self.problem
        if self.method not in EXPECTED:
            return "no figure to compare with"
        return "as expected" if self.met else "ABOVE by more than a quarter"

    @property
    def met(self) -> bool:
        return not self.problem and self.step <= SLACK * EXPECTED.get(self.method, (float("inf"), ""))[0]

    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        if self.problem:
            return (f"`{self.method}`", self.against, *[""] * 5, self.problem)
        factor, why = EXPECTED.get(self.method, (None, ""))
        return (
            *(f"`{self.method}`", self.against, f"{self.step:.2f}x", f"{self.low:.2f}x–{self.high:.2f}x"),
            *("" if factor is None else f"{factor:.2f}x", why, f"{self.memory:.2f}x", self.verdict),
        )


def table(costs: list[Cost]) -> str:
    """Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(cost.cells() for cost in costs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def names() -> list[str]:
    """Every method but the one that does nothing."""
    return [name for name in methods.names() if name != "none"]


def together(names: Sequence[str], most: int) -> list[list[str]]:
    """Groups of at most `most` methods that are compared with the same training, so that it is measured once."""
    found: dict[str, list[list[str]]] = {}
    for name in names:
        groups = found.setdefault(repr(without(recipe(name), name)), [[]])
        if len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(name)
    return [group for groups in found.values() for group in groups]


def measure(names: Sequence[str], settings: Settings, peaks: dict[str, int]) -> dict[str, Cost]:
    """Methods as their examples use them, against the rest of that recipe (so LoRA methods against LoRA).

    Args:
        names: methods that have the same rest; they and it take their steps in turn.
        peaks: peak bytes of what methods were compared with before, by name; added to.
    """
    rest = without(recipe(names[0]), names[0])
    against = " + ".join(names_of(rest)) or "plain"
    steps = settings.repeats + WARM_UP
    try:
        given = [recipe(name) for name in names]
        made = [_trainer(settings, entries, steps) for entries in (*given, rest)]
        *times, plain = steps_in_turn(made)
        del made
        give_back()
        if against not in peaks:
            peaks[against] = peak_bytes(lambda: _trainer(settings, rest, 2))
        memory = [peak_bytes(lambda own=own: _trainer(settings, own, 2)) / peaks[against] for own in given]
    except Exception as error:  # one method that cannot be trained here must not hide the cost of the others
        if len(names) > 1:
            return {name: cost for one in names for name, cost in measure([one], settings, peaks).items()}
        problem = f"not measured: {type(error).__name__}: {error}".splitlines()[0]
        return {names[0]: Cost(names[0], against, 0, 0, 0, 0, "", problem)}
    found = {}
    for name, seconds, share in zip(names, times, memory):
        line = ratio(name, against, [seconds, plain], float("inf"), f"{settings.batch} rows a step")
        found[name] = Cost(name, against, line.value, line.low or 0.0, line.high or 0.0, share, line.detail)
    return found


def _trainer(settings: Settings, entries: Sequence[Any], steps: int) -> Any:
    import training_steps

    return training_steps.trainer(settings, methods.build(entries), steps, orders=1)
