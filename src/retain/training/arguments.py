"""Settings of the training: what the user gave, checked, over our own defaults."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from retain.errors import ConfigError, unknown

#: Where a configuration says nothing. A short warm-up because Adam's first steps have no history.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "max_length": 512,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
}
RESERVED = {"output_dir", "seed", "data_seed", "resume_from_checkpoint", "disable_tqdm", "logging_nan_inf_filter"}
#: How fields of SDFTConfig begin that are settings of the method `sdft`.
METHODS_OWN = (
    "distillation_",
    "teacher_",
    "num_loss_tokens_to_skip",
    "num_generations",
    "generate_from_teacher",
    "max_completion_length",
    "temperature",
)
#: Trackers of transformers that are called otherwise than their module and their package.
PACKAGES = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
}
#: Full fine-tuning moves every weight: a tenth of the rate of weights that were added.
FULL_LEARNING_RATE = 2e-5


def complete(given: dict[str, Any], lora: bool, on_policy: str = "") -> dict[str, Any]:
    """Fields of `trl.SFTConfig`: those given, and ours for the rest, which depend on the machine.

    With `on_policy`, the name of a method that learns from answers which the model writes, they are those of
    `trl.experimental.sdft.SDFTConfig`, and `max_length`, there of a prompt with the given answer.

    Args:
        lora: what learns was added to the model (by LoRA, or by another method that adds weights).

    Raises:
        ConfigError: an unknown or reserved key, or a tracker that is not there.
    """
    import torch

    from retain.models.params import computes_bf16

    train = {**DEFAULTS, **({} if lora else {"learning_rate": FULL_LEARNING_RATE}), **given}
    if on_policy:
        check_on_policy(train, on_policy)
    else:
        check(train)
    check_trackers(train["report_to"])
    if not torch.accelerator.is_available():
        train.setdefault("use_cpu", True)  # bfloat16 on a CPU has to be asked for in this way
        # TRL's default trades a third more computing for memory, which a small model on a CPU does not lack
        train.setdefault("gradient_checkpointing", False)
    if not {"bf16", "fp16"} & train.keys():
        train["bf16"] = computes_bf16("cuda" if torch.cuda.is_available() and not train.get("use_cpu") else "cpu")
    return train


def check(train: dict[str, Any]) -> None:
    """Every key must be a field of TRL's SFTConfig, and not one that the run itself owns.

    Raises:
        ConfigError: an unknown or reserved key.
    """
    from trl import SFTConfig

    _known(train, {f.name for f in dataclasses.fields(SFTConfig)}, "trl.SFTConfig")


def check_trackers(report_to: str | list[str] | None) -> None:
    """Every tracker must be one that transformers knows, and installed: it is first used when training begins.

    Raises:
        ConfigError: another name, or a package that is not there.
    """
    from transformers.integrations import integration_utils as trackers

    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("none", "all"):
            continue
        if name not in trackers.INTEGRATION_TO_CALLBACK:
            raise ConfigError(unknown("train.report_to", str(name), [*trackers.INTEGRATION_TO_CALLBACK, "none"]))
        module, package = PACKAGES.get(name, (name, name))
        if not getattr(trackers, f"is_{module}_available")():
            there = ", ".join(trackers.get_available_reporting_integrations()) or "none"
            raise ConfigError(
                f"train.report_to: '{name}' is not installed. Run `pip install {package}`, or name one that is there: "
                f"{there}."
            )


def check_on_policy(train: dict[str, Any], method: str) -> None:
    """Every key must be a field of TRL's SDFTConfig that the method does not set itself, or `max_length`.

    Raises:
        ConfigError: an unknown or reserved key, or one that belongs to learning from given answers.
    """
    from trl import SFTConfig
    from trl.experimental.sdft import SDFTConfig

    known = {f.name for f in dataclasses.fields(SDFTConfig)}
    for key in train:
        if key.startswith(METHODS_OWN):
            raise ConfigError(f"train.{key}: a setting of the method. Set it under `methods: {method}`.")
        if key not in known | {"max_length"} and key in {f.name for f in dataclasses.fields(SFTConfig)}:
            raise ConfigError(
                f"train.{key}: has no effect with `{method}`, which learns from answers that the model writes. "
                "Remove it."
            )
    _known(train, known | {"max_length"}, "trl.experimental.sdft.SDFTConfig")


def _known(train: dict[str, Any], known: set[str], where: str) -> None:
    for key in train:
        if key in RESERVED:
            raise ConfigError(f"train.{key}: set by the run itself (see `seed` and `output`). Remove it.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"train: unknown '{key}'.{hint} Allowed: any field of {where}.")
