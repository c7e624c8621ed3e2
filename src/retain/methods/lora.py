"""LoRA — learns a low-rank change of the linear layers and leaves the base weights alone.

    W' = W + s B A,   s = alpha / r                                  (Hu et al. 2021, arXiv:2106.09685, eq. 3)

A [r, in] random, B [out, r] zero, so training starts at the given model. Fewer directions can move, which
loses less of what the base could do; it is the carrier for most other methods at low cost. `kind` is another kind
of adapter from PEFT; methods that hold or average weights then do so with its parameters, one by one.
Deviations from the paper: alpha defaults to 2r; all linear layers are adapted by default, not q and v alone.
    In a sequence, each task gets a fresh adapter and the previous one is merged into the base (a quantised
    base cannot be merged without loss, so there the same adapter goes on learning).
Needs: nothing.
Cost: no extra pass; r·(in + out) trainable weights per layer, and their optimizer state.
Combine with: nearly every other method.   Conflicts: packnet (which keeps single weights), blocks
    (which trains whole ones).
Tune: `domain: near`, `middle` or `far`, or `r` 4–8 for a near domain and 16–32 for a far one; `domains` where tasks
    differ in this; learning rate about ten times that of full fine-tuning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from retain.errors import ConfigError, unknown
from retain.methods.base import Method, MethodConfig
from retain.methods.context import Run
from retain.models import params
from retain.models.targets import target_modules

#: Settings by how far what is learned lies from what the model knows.
PRESETS: dict[str, dict[str, Any]] = {
    "near": {"r": 8, "targets": "qv"},
    "middle": {"r": 16, "targets": "attention"},
    "far": {"r": 32, "targets": "all"},
}


class Adapter(MethodConfig):
    """The size and the place of an adapter."""

    r: int = Field(16, ge=0)
    """Rank; 0 turns LoRA off."""
    alpha: float | None = Field(None, gt=0)
    """Scale numerator; 2r when not given."""
    targets: Literal["qv", "attention", "all"] | list[str] = "all"
    """Which linear layers: q and v, all of attention, all linear layers, or module names."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    domain: Literal["near", "middle", "far"] | None = None
    """A preset: near is r 8 on q and v, middle r 16 on attention, far r 32 everywhere; what is given goes first."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return PRESETS.get(str(given.get("domain")), {}) | given if isinstance(given, dict) else given


class LoRA(Method):
    """Low-rank adapters through PEFT."""

    family = "isolation"
    paper = "arXiv:2106.09685, eq. 3"
    adds_parameters = True
    off = {"r": 0}

    class Config(Adapter):
        domains: dict[str, Adapter] = {}
        """Other `r`, `alpha`, `targets`, `dropout` or `domain` for single tasks, by their names; r is 1 or more."""
        dora: bool = False
        """Weight-decomposed LoRA (arXiv:2402.09353)."""
        kind: Literal["lora", "ia3", "loha", "lokr", "hra", "vera", "randlora", "miss"] = "lora"
        """Another kind of adapter, with PEFT's own defaults for what is not set here; r is ignored by ia3."""

        @field_validator("domains")
        @classmethod
        def _with_rank(cls, domains: dict[str, Adapter]) -> dict[str, Adapter]:
            for name, domain in domains.items():
                if domain.r == 0:
                    raise ValueError(f"'{name}' has r 0, and a task cannot go without an adapter; r is 1 or more")
            return domains

    def check(self, tasks: Sequence[str] = ()) -> None:
        for name in self.config.domains:
            if tasks and name not in tasks:
                raise ConfigError(unknown("methods.lora.domains", name, tasks))

    def settings(self, task: str) -> Any:
        """The settings for a task: those of its domain, and what that leaves open as it is for all."""
        domain = self.config.domains.get(task)
        if domain is None:
            return self.config
        given = {key: getattr(domain, key) for key in domain.model_fields_set}
        # an alpha for all belongs to the rank for all
        return self.config.model_copy(update=({"alpha": None} if "r" in given else {}) | given)

    def prepare_model(self, model: Any, run: Run) -> torch.nn.Module:
        from peft import get_peft_model, prepare_model_for_kbit_training

        c = self.settings(run.task)
        if c.domains:
            if getattr(params.causal(model), "is_quantized", False):
                raise ConfigError(
                    "methods.lora.domains: on a quantised base one adapter learns all tasks. Remove `domains`, or set "
                    "`quantize: none`."
                )
            where = c.targets if isinstance(c.targets, str) else ", ".join(c.targets)
            which = "as its domain says" if run.task in c.domains else "as no domain has this name"
            run.say(f"lora: task '{run.task}' has r {c.r} on {where}, {which}.")
        if hasattr(model, "peft_config"):
            if getattr(model, "is_quantized", False) or getattr(model.get_base_model(), "is_quantized", False):
                return model
            model = model.merge_and_unload()
        if getattr(model, "is_quantized", False):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(run.seed + run.task_index)  # A is random: the same run must draw the same A
        return get_peft_model(model, self._peft(model, c))

    def _peft(self, model: Any, c: Any) -> Any:
        """PEFT's configuration of the adapter."""
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig

        alpha = c.alpha or 2 * c.r
        common: dict[str, Any] = {"target_modules": target_modules(model, c.targets), "task_type": "CAUSAL_LM"}
        if c.kind == "lora":
            return LoraConfig(r=c.r, lora_alpha=alpha, lora_dropout=c.dropout, use_dora=c.dora, **common)
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[c.kind.upper()]  # names are keys too
        known = {field.name for field in dataclasses.fields(config)}
        lacking = {"alpha": c.alpha and "alpha" not in known, "dropout": c.dropout, "dora": c.dora}
        for setting in (name for name, missing in lacking.items() if missing):
            raise ConfigError(f"methods.lora.{setting}: `kind: {c.kind}` has none. Remove it, or use `kind: lora`.")
        if getattr(model, "is_quantized", False):
            raise ConfigError(f"methods.lora.kind: '{c.kind}' on a quantised base is not supported. Use `kind: lora`.")
        return config(**{key: value for key, value in {"r": c.r, "alpha": alpha}.items() if key in known}, **common)

    @torch.no_grad()
    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        # on a quantised base TRL rounds the factors to bfloat16, in which small steps and pulls vanish
        for pair in params.lora_pairs(model).values():
            for factor in (pair.A, pair.B):
                if factor.dtype == torch.bfloat16:
                    factor.data = factor.data.float()


def with_adapter(model: Any, run: Run) -> Any:
    """The model with a fresh adapter: the one that it got for this task, otherwise one with default settings.

    For methods that act on LoRA factors, so that they also work where `lora` is not listed.
    """
    if hasattr(model, "peft_config") and any(c.peft_type != "LORA" for c in model.peft_config.values()):
        return model
    pairs = params.lora_pairs(model).values()
    # without weights there is nothing to look at, and the adapter was made just now
    fresh = bool(pairs) and not any(not pair.B.is_meta and bool(pair.B.any()) for pair in pairs)
    return model if fresh else LoRA().prepare_model(model, run)


def check_factors(name: str, model: Any) -> None:
    """Refuse a model in which no LoRA factor is trained, for methods that act on nothing else."""
    if not params.lora_pairs(model):
        raise ConfigError(f"methods.{name}: no LoRA factor is trained. Set `lora: {{kind: lora}}`, and freeze less.")


def check_merged(name: str, model: Any) -> None:
    """Refuse a base on which adapters are not merged after a task, for methods that need a fresh one per task."""
    if getattr(params.causal(model), "is_quantized", False):
        raise ConfigError(
            f"methods.{name}: needs an adapter of its own for each task, merged afterwards, which a quantised base "
            "cannot take. Set `quantize: none`."
        )
