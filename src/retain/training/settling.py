"""The last step of a budget: as much of what was learned as is inside it, and what would help to keep more."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from retain.errors import ConfigError
from retain.functional import budget as maths
from retain.methods.base import Stack
from retain.models.own_rows import fingerprint
from retain.probes.asking import are_answers
from retain.results import Budget, BudgetPoint, load_items, save_items, write_text
from retain.training import hosts
from retain.training.control import Spread
from retain.training.way import Way

if TYPE_CHECKING:
    from retain.training.budget import ForgettingBudget

#: Answers until the outcome is known, under the folder of the budget.
ASKED = "asked"
#: Methods that keep something of the end for the next task before it is known where the model stays → why not.
REFUSED = {
    "slao": "it merges the adapter that it hands to the next task by itself, and a share of the way is not in it",
}


def refuse(stack: Stack) -> None:
    """Refuse methods whose model cannot be led back.

    Raises:
        ConfigError: one of `REFUSED`.
    """
    for method in stack.methods:
        if method.name in REFUSED:
            raise ConfigError(f"budget: not with `{method.name}`: {REFUSED[method.name]}. Remove one of them.")


def settle(budget: ForgettingBudget, model: Any, run: Any) -> Budget | None:
    """Search the share, leave the model there, write down what it came to; None on other processes than the main one.

    The loss is that against the base of the whole run, so a later task has what earlier ones left. Answers are kept
    until the outcome is written, by the weights that gave them: after a stop none is asked for again.
    """
    way, control = Way(model, run.start), budget.control
    device = next(iter(way.parameters.values())).device
    if not PartialState().is_main_process:
        way.go(hosts.from_main(None))
        return None
    spreads: list[Spread | None] = []
    gains: dict[float, float | None] = {}

    def ask(share: float, probes: Any, what: str) -> list[dict[str, Any]]:
        way.go(share)
        path = budget.folder / ASKED / f"{fingerprint(model)}-{share!r}-{what}.parquet"
        rows = load_items(path) if path.is_file() else []
        if not are_answers(rows, probes):
            rows = control.ask(model, budget.tokenizer, device, probes)
            save_items(rows, path)
        return rows

    def point(share: float) -> BudgetPoint:
        found, spread = control.point(share, ask(share, control.kept, "kept"))
        spreads.append(spread)
        return found

    def gain(share: float) -> float | None:
        if share not in gains:
            gains[share] = control.gain(ask(share, control.learned, "learned")) if control.learned else None
        return gains[share]

    share, points = maths.largest_inside(point, budget.settings.tries, lambda end: control.guess(end, spreads[0]))
    c, standing = budget.settings, budget.standing
    needed = None
    if (first := spreads[0]) is not None and points[0].upper is not None and points[0].upper > c.lose_at_most:
        needed = maths.items_to_show(*first, c.lose_at_most, c.confidence)
    outcome = Budget(
        task=budget.task,
        lose_at_most=c.lose_at_most,
        lose_at_most_nats=c.lose_at_most_nats,
        confidence=c.confidence,
        probes=control.names,
        items=control.items,
        feasible=share > 0,
        share=share,
        points=sorted(points, key=lambda one: one.share),
        learned=gain(share),
        learned_without=gain(1.0),
        factor=standing.dual.get("factor", 1.0),
        drift=standing.drift,
        drift_limit=standing.limit,
        taken_back=standing.taken,
        items_needed=needed,
    )
    outcome = outcome.model_copy(update={"advice": advice(outcome, budget.driven, budget.dual.most)})
    way.go(hosts.from_main(share))
    write_text(place(budget.folder, budget.task), outcome.model_dump_json(indent=1) + "\n")
    shutil.rmtree(budget.folder / ASKED, ignore_errors=True)
    budget.say(f"{budget.task}: {in_words(outcome)}" if budget.task else in_words(outcome))
    return outcome


def place(folder: Any, task: str) -> Any:
    """The file of what the budget of a task came to."""
    return folder / f"{task or 'budget'}.json"


def in_words(outcome: Budget) -> str:
    """One line for the person at the terminal."""
    chosen = next((p for p in outcome.points if p.share == outcome.share), None)
    if chosen is None:
        return "budget: nothing of what was learned is inside it; the model is where the task began."
    bounds = [f"{chosen.upper:.2%}"] if chosen.upper is not None else []
    bounds += [f"{chosen.upper_nats:.3f} nats per token"] if chosen.upper_nats is not None else []
    return (
        f"budget: {outcome.share:.0%} of the way to what was learned is inside it; at most {' and '.join(bounds)} lost "
        f"({outcome.confidence:.0%} confidence)."
    )


def advice(outcome: Budget, driven: list[str], most: float) -> list[str]:
    """What would let more of what was learned stay, from what was seen; none where all of it does.

    Args:
        driven: what followed the drift.
        most: the largest factor that it could have.
    """
    if outcome.share == 1:
        return []
    end = next(p for p in outcome.points if p.share == 1)
    lines = []
    if outcome.items_needed is not None and outcome.items_needed > outcome.items:
        lines.append(
            f"more probe items: about {outcome.items_needed} in place of {outcome.items} would show that all of what "
            "was learned is inside the budget"
        )
    lost = end.loss is not None and end.loss.value > outcome.lose_at_most
    lost = lost or (end.nats is not None and end.nats > outcome.lose_at_most_nats)
    strained = bool(driven) and outcome.factor >= most
    if strained:
        lines.append(f"{' and '.join(driven)} stronger: the factor ended at its largest ({most:g})")
    if lost and "replay" not in driven:
        lines.append("replay: rows that stand for old data, which nothing here mixes in by the budget")
    elif strained or lost:
        lines.append("more replay: a larger `fraction` or more rows")
    if outcome.taken_back or lost:
        seen = f": {outcome.taken_back} jumps of the drift were taken back" if outcome.taken_back else ""
        lines.append(f"a lower learning rate{seen}")
    bounds = [f"lose_at_most: {end.upper:.3g}"] if end.upper is not None and end.upper > outcome.lose_at_most else []
    if end.upper_nats is not None and end.upper_nats > outcome.lose_at_most_nats:
        bounds.append(f"lose_at_most_nats: {end.upper_nats:.3g}")
    lines.append(f"a looser budget: `{', '.join(bounds)}` would let all of what was learned stay")
    return lines
