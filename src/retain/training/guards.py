"""Checks before and at step 1: a setting that would have no effect is an error, never a silent no-op."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from retain.errors import ConfigError
from retain.methods.base import Stack
from retain.methods.context import Run
from retain.models import bottleneck, params

logger = logging.getLogger(__name__)


def available(run: Run) -> frozenset[str]:
    """What methods may rely on in this run, for `Stack.check_needs`."""
    return frozenset({"old"} if run.old is not None else ())


def check_host(trainer: Any, stack: Stack) -> None:
    """Refuse combinations of trainer and methods that would do nothing or the wrong thing.

    Raises:
        ConfigError: a method that writes its own answers under a trainer that learns from given ones, DeepSpeed or
            fp16 with methods that edit gradients, shards with methods that swap weights or with bottleneck adapters,
            or nothing to train.
    """
    if stack.writer is not None and not trainer.on_policy:
        raise ConfigError(
            f"methods.{stack.writer.name}: learns from answers that the model writes, which this trainer does not do. "
            "Use `ContinualSDFTTrainer`."
        )
    editors = [m.name for m in stack.methods if m.edits_gradients]
    if editors and trainer.is_deepspeed_enabled:
        raise ConfigError(
            f"methods.{editors[0]}: edits gradients, which DeepSpeed has already used and cleared by then. "
            "Use DDP, or methods that work on data (replay)."
        )
    if editors and getattr(trainer.args, "fp16", False):
        raise ConfigError(
            f"methods.{editors[0]}: gradients are scaled under fp16, so the pull would be lost. "
            "Set `train: {bf16: true, fp16: false}`."
        )
    swappers = [m.name for m in stack.methods if m.swaps_weights]
    if swappers and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise ConfigError(
            f"methods.{swappers[0]}: runs the model with its start weights in place, which shards do not allow. "
            "Use DDP, with `lora` where the model is large."
        )
    if trainer.is_fsdp_enabled and trainer.model is not None and bottleneck.count(trainer.model):
        raise ConfigError(
            "model: bottleneck adapters cannot be written from shards yet. Use DDP, or `lora` in place of `bottleneck`."
        )
    if trainer.model is not None and not params.trainable(trainer.model):
        raise ConfigError("model: no parameter is trainable. A quantised model needs `lora`; or freeze less.")


def check_gradients(model: Any) -> None:
    """After the first backward: gradients must have reached what is trained.

    Raises:
        ConfigError: no trainable parameter received a gradient.
    """
    learning = params.trainable(model)
    missing = [name for name, p in learning.items() if p.grad is None]
    if len(missing) == len(learning):
        raise ConfigError("training step 1: no trainable parameter received a gradient; nothing would be learned.")
    if missing:
        logger.warning(
            "%d of %d trainable tensors received no gradient at step 1, e.g. %s",
            len(missing),
            len(learning),
            missing[0],
        )


def check_held(stack: Stack, held: params.Tensors, model: Any) -> None:
    """At step 1: what methods took hold of at the start of the task must be what is trained.

    Args:
        held: trainable parameters by name, as they were when the methods started.

    Raises:
        ConfigError: the host replaced parameters since (FSDP does), so that edits would go nowhere.
    """
    editors = [m.name for m in stack.methods if m.edits_gradients]
    if editors and any(p is not held.get(name) for name, p in params.trainable(model).items()):
        raise ConfigError(
            f"methods.{editors[0]}: the trainer replaced the model's parameters when it wrapped them (FSDP does), so "
            "the pull would reach nothing. Train on one device or with DDP, or remove the method."
        )


@torch.no_grad()
def weights_finite(model: Any) -> bool:
    """Whether every trained weight of this rank is a number; asked before a checkpoint replaces a good one."""
    return all(bool(torch.isfinite(part).all()) for part in params.locals_of(params.trainable(model).values()))
