"""A method that acts more strongly from a step on: the strength of one, or the share of replay."""

from __future__ import annotations

from typing import Any

from retain.errors import ConfigError, unknown

REPLAY = "replay"


def check(trainer: Any, name: str) -> None:
    """Refuse what cannot be raised; called when training begins, when the mixture of rows is known.

    Raises:
        ConfigError: a trainer without methods, no such method, or one without a strength that acts in every step.
    """
    stack = getattr(trainer, "stack", None)
    if stack is None:
        raise ConfigError(
            "monitor.raised: this trainer has no methods to raise. Use `ContinualTrainer`, or another `action`."
        )
    shares = any(m.name == REPLAY for m in stack.methods) and trainer._sampler is not None
    if name == REPLAY and not shares:
        raise ConfigError(
            "monitor.raised: there is no share of replay to raise (no `replay` among the methods, or a stream). "
            "Add it, or name another method."
        )
    fit = [m.name for m in stack.methods if m.boosts] + [REPLAY] * shares
    if name not in fit:
        raise ConfigError(unknown("monitor.raised", name, fit))


def driven(trainer: Any) -> list[str]:
    """What a budget may make stronger or weaker: the methods with `strength: auto`; without any of these, all whose
    `boost` has an effect, and replay."""
    methods = trainer.stack.methods
    if any(m.auto for m in methods):
        return [m.name for m in methods if m.auto]
    shares = any(m.name == REPLAY for m in methods) and trainer._sampler is not None
    return [m.name for m in methods if m.boosts and m.name != REPLAY] + [REPLAY] * shares


def put(trainer: Any, name: str, step: int, factor: float) -> None:
    """Set the factor, after `step` optimizer steps: of a method at once, of replay from the first step on whose rows
    were certainly not read yet."""
    if name != REPLAY:
        next(m for m in trainer.stack.methods if m.name == name).boost = factor
        return
    args = trainer.args
    # every process has a batch ready, and workers some more
    ahead = (1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)) * args.world_size
    trainer._sampler.raise_share(step + 1 + -(-ahead // args.gradient_accumulation_steps), factor)
