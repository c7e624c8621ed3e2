"""What follows from a look: when an alarm is one, which look is the best, when to stop. Numbers in, decisions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from retain.config import MonitorConfig


@dataclass
class Standing:
    """What a monitor remembers from look to look; the part of its log that a resumed training needs.

    Args:
        above: looks at the probes in a row, up to the last one, with too much forgetting.
        best, best_step: the highest score of a look, and where.
        since_best: looks at the probes since then.
        factor: of `action: raise`, in all.
        stopped: whether the monitor ended the training.
    """

    above: int = 0
    best: float | None = None
    best_step: int | None = None
    since_best: int = 0
    factor: float = 1.0
    stopped: bool = False

    @classmethod
    def of(cls, record: dict[str, Any] | None) -> Standing:
        """As a record of the log holds it; a new one without a record."""
        known = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in (record or {}).get("standing", {}).items() if k in known})


@dataclass
class Decision:
    """What to do after a look; the same on every process.

    Args:
        stop: end the training.
        restore: put the best weights back.
        keep: these are the best weights so far.
        factor: the new factor in all, or None.
        did: what was done, a word each.
        say: lines for the person at the terminal.
    """

    stop: bool = False
    restore: bool = False
    keep: bool = False
    factor: float | None = None
    did: tuple[str, ...] = ()
    say: tuple[str, ...] = ()


def decide(
    settings: MonitorConfig, standing: Standing, step: int, forgetting: float, score: float, worst: dict[str, float]
) -> Decision:
    """Take a look at the probes into account; `standing` is brought up to date.

    An alarm needs `patience` looks in a row above `max_forgetting`, because one look in twenty is off by chance, and
    there are many looks. After a raise it needs as many again, so that the raise has time to act.

    Args:
        step: optimizer steps done.
        forgetting: mean relative drop of old abilities, 0 to 1.
        score: of this look; higher is better.
        worst: relative drop of every old ability.
    """
    made = Decision()
    standing.above = standing.above + 1 if forgetting > settings.max_forgetting else 0
    if standing.best is None or score > standing.best:
        standing.best, standing.best_step, standing.since_best = score, step, 0
        made.keep = settings.action == "restore"
    else:
        standing.since_best += 1
    did: list[str] = []
    say: list[str] = []
    alarm = standing.above >= settings.patience
    if alarm:
        names = [f"{name} {drop:.0%}" for name, drop in sorted(worst.items(), key=lambda one: -one[1]) if drop > 0]
        lost = f"step {step}: {forgetting:.0%} of old abilities forgotten (above {settings.max_forgetting:.0%})"
        lost += f", most: {', '.join(names[:3])}" if names else ""
        if settings.action == "raise":
            factor = min(standing.factor * settings.factor, settings.most)
            if factor > standing.factor:
                made.factor = standing.factor = factor
                standing.above = 0
                did.append("raise")
                say.append(f"{lost}; {settings.raised} raised to {factor:g} times its setting.")
            else:
                did.append("warn")
                say.append(f"{lost}; {settings.raised} is at its largest factor ({settings.most:g}) already.")
        elif settings.action == "warn":
            did.append("warn")
            say.append(f"{lost}. Lower the learning rate, or add `replay` or `distill`.")
        else:
            made.stop = True
            say.append(f"{lost}; training stops.")
    if settings.early_stop and standing.since_best >= settings.early_stop and not made.stop:
        made.stop = True
        say.append(
            f"step {step}: no better {settings.score} than {standing.best:.3f} at step {standing.best_step} in "
            f"{standing.since_best} looks; training stops."
        )
    if made.stop:
        standing.stopped = True
        did.append("stop")
        if settings.action == "restore" and standing.best_step != step:
            made.restore = True
            did.append("restore")
            say.append(f"weights of step {standing.best_step} are put back ({settings.score} {standing.best:.3f}).")
    made.did, made.say = tuple(did), tuple(say)
    return made


def loss_gain(history: Sequence[Mapping[str, Any]], since: int) -> float:
    """Relative fall of a loss, which stands for a new-task score where there is none: 0.5 is a loss half as large.

    Of the evaluation loss from the first evaluation to the last, where there are two; else of the training loss from
    the first logged line to the mean of those after the step `since`.

    Args:
        history: `TrainerState.log_history`.
    """
    losses = [float(entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if len(losses) < 2:
        logged = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
        recent = [loss for step, loss in logged if step > since] or [loss for _, loss in logged[-1:]]
        losses = [logged[0][1], float(np.mean(recent))] if logged else []
    return (losses[0] - losses[-1]) / losses[0] if losses and losses[0] > 0 else 0.0


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What a look sends to trackers: `drift/…` in nats per token, `forgetting/…` as shares, `kept/…` in percent,
    `learned/…` as scores."""
    shown = {"drift/kl": record["kl"]["value"], "drift/loss": record["loss"]}
    if "forgetting" in record:
        shown |= {"forgetting/overall": record["forgetting"]["value"], "monitor/score": record["score"]}
    for name, one in record.get("probes", {}).items():
        if one["role"] == "reference":
            shown |= {f"forgetting/{name}": one["forgetting"], f"kept/{name}": one["retention"]}
        else:
            shown[f"learned/{name}"] = one["score"]["value"]
    if record["standing"]["factor"] != 1:
        shown["monitor/factor"] = record["standing"]["factor"]
    return shown
