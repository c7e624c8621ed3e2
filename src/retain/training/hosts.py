"""What a callback has to find out about the trainer that calls it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from retain.errors import ConfigError


def calling_trainer() -> Any:
    """The trainer that called a callback; None where there is none. The host does not hand it on, and only it reaches
    the other callbacks, those of trackers among them."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


def log(trainer: Any, numbers: dict[str, float]) -> None:
    """Hand numbers to the trackers and the history of a trainer, without a trace in its own lines."""
    wanted = trainer.control.should_log  # is taken back by a log, and the trainer's line of this step is yet to come
    # not `trainer.log`: subclasses add to each line what they collected since the last one, and begin anew
    Trainer.log(trainer, numbers)
    trainer.control.should_log = wanted


def unwrapped(model: Any) -> Any:
    """Without DDP, whose forward pass would wait for the other processes."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def from_main(value: Any) -> Any:
    """The main process's value on every process; the others wait here until it has one."""
    if PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]


def refuse_shards(who: str = "monitor") -> None:
    """Refuse models of which no process has the whole.

    Args:
        who: looks at the model.

    Raises:
        ConfigError: FSDP, ZeRO-3 or Megatron.
    """
    kind = AcceleratorState().distributed_type if AcceleratorState._shared_state else None
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM) or is_deepspeed_zero3_enabled():
        raise ConfigError(
            f"{who}: one process looks at the model while others wait, which shards (FSDP, ZeRO-3) do not allow. "
            f"Use DDP, or remove the {who}."
        )
