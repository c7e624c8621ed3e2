"""Adam's second moment as an importance: from a live optimizer, or from the file of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retain.errors import ConfigError
from retain.functional.fisher import Importance
from retain.models import params

Moments = Callable[[torch.nn.Parameter], dict[str, Any]]


def second_moments(model: Any, moments: Moments, decay: float, where: str) -> Importance:
    """v / (1 − β₂^steps) of every trainable weight, in at least float32, not normalised; 0 for one never stepped.

    Args:
        moments: the optimizer's state of a parameter (`run.moments`).
        decay: β₂.
        where: the setting, for messages.

    Raises:
        ConfigError: adapters are trained, or the optimizer keeps no second moment of every weight.
    """
    if params.lora_pairs(model):
        raise ConfigError(
            f"{where}: 'adam' has no effect with LoRA, as Adam knows A and B, not their product; use 'sampled'."
        )
    found = Importance(estimator="adam")
    for name, parameter in params.trainable(model).items():
        state = moments(parameter)
        if state and "exp_avg_sq" not in state:
            raise ConfigError(
                f"{where}: the optimizer keeps {', '.join(map(str, state)) or 'nothing'}, no `exp_avg_sq`. Use "
                "`optim: adamw_torch`, or `estimator: sampled`."
            )
        wide = torch.promote_types(parameter.dtype, torch.float32)
        steps = float(state.get("step", 0))
        if steps == 0:
            found.diagonal[name] = torch.zeros_like(parameter, dtype=wide, requires_grad=False)
        else:
            moment = state["exp_avg_sq"].detach().to(parameter.device, wide, copy=True)
            found.diagonal[name] = moment.reshape(parameter.shape) / (1 - decay**steps)
    if found.total() == 0:
        raise ConfigError(f"{where}: the optimizer has made no step. Use `estimator: sampled`.")
    return found


def from_file(path: Path, model: Any, where: str) -> Importance:
    """The same from `optimizer.pt` of a checkpoint of the Hugging Face trainer on this model.

    Such a file numbers the weights: those with weight decay first, then the others, each in the model's order.

    Raises:
        ConfigError: the file is not one of those, or was made on other weights.
    """
    from transformers import Trainer

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        groups, state = [group["params"] for group in saved["param_groups"]], saved["state"]
        decay = float(saved["param_groups"][0]["betas"][1])
    except Exception as error:  # whatever unpickling says to a file that is something else
        raise ConfigError(
            f"{where}: '{path}' is not the state of an Adam optimizer ({type(error).__name__}). Give `optimizer.pt` of "
            "a checkpoint, or a safetensors file."
        ) from None
    learning = params.trainable(model)
    decayed = set(Trainer.get_decay_parameter_names(None, params.causal(model)))  # type: ignore[arg-type]
    ordered = [[n for n in learning if n in decayed], [n for n in learning if n not in decayed]]
    numbers = {name: number for names, group in zip(ordered, groups) for name, number in zip(names, group)}
    shapes = {n: tuple(state[i]["exp_avg_sq"].shape) for n, i in numbers.items() if "exp_avg_sq" in state.get(i, {})}
    if [len(g) for g in groups] != [len(names) for names in ordered] or any(
        shape != tuple(learning[name].shape) for name, shape in shapes.items()
    ):
        raise ConfigError(
            f"{where}: '{path}' was made on other weights, or in groups of its own. Give `optimizer.pt` of a training "
            "of the same weights of this model."
        )
    by_id = {id(p): state.get(numbers[name], {}) for name, p in learning.items()}
    return second_moments(model, lambda parameter: by_id[id(parameter)], decay, where)
