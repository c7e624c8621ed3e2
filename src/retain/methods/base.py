"""The method protocol, and the stack that runs several methods as one.

A method overrides only the hooks it needs; every default does nothing. It never touches the trainer's loss,
its loaders or another method: it returns values, and the trainer scales and combines them.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from retain.errors import ConfigError, unknown

if TYPE_CHECKING:
    from retain.data.mixture import Mixture
    from retain.methods.context import Batch, Run, Tokens


AUTO = "auto"  # for a strength: let a budget find it


class MethodConfig(BaseModel):
    """Settings of a method: frozen, unknown keys rejected, documented by the strings under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Strength(MethodConfig):
    """Settings of a method with a strength; 0 turns the method off."""

    strength: float = Field(1.0, ge=0)
    """How strongly the method acts; 0 is off."""

    @field_validator("strength")
    @classmethod
    def _not_negative(cls, value: float) -> float:
        if value < 0:  # here as well, since a subclass that gives another default loses the bound of the field
            raise ValueError("Input should be greater than or equal to 0")
        return value


class Turn(IntEnum):
    """Who edits the gradients, and then the step, before whom."""

    CLOSE = 0  # parameters that do not learn now: nobody needs to work on them
    REPLACE = 1  # the loss's own gradient by another one of the same rows
    ADD = 2  # a term
    BEND = 3  # the sum, where it conflicts with something
    SELECT = 4  # entries by what the optimizer would do
    PROJECT = 5  # off directions: what came before must not lead back into them
    HOLD = 6  # weights, bit for bit: last, as nothing may move them any more


class Method:
    """One idea against forgetting. The file is named as the method is in the configuration."""

    name: ClassVar[str] = ""  # filled in from the file name
    family: ClassVar[str] = ""  # weights | functions | replay | isolation | merging
    paper: ClassVar[str] = ""  # "arXiv:1612.00796, eq. 3"
    conflicts: ClassVar[dict[str, str]] = {}  # methods it cannot be combined with → why
    edits_gradients: ClassVar[bool] = False  # touches gradients or weights itself: refused under DeepSpeed
    swaps_weights: ClassVar[bool] = False  # runs the model with other weights in place: refused on shards
    adds_parameters: ClassVar[bool] = False  # prepares the model before methods that choose among parameters
    adds_on_top: ClassVar[int] = (
        0  # of those, 1 rebuilds the adapter, 2 comes after what wraps the model and freezes it
    )
    turn: ClassVar[Turn] = Turn.ADD  # when it edits the gradients of a step, wherever it is listed
    restrains_steps: ClassVar[bool] = False  # its `on_step_end` takes back a part of the step: after those that add one
    finishes_last: ClassVar[bool] = False  # its `finish_model` moves what others leave
    repeats_batches: bool = False  # runs the micro-batches of a step again: `run.step_batches` keeps them
    auto: bool = False  # whether a budget finds the strength
    boost: float = (
        1.0  # factor on the strength while it trains, above what the settings say: a monitor or a budget sets it
    )
    on_policy: ClassVar[str] = ""  # why there are no supervised tokens: it learns from answers that the model writes
    off: ClassVar[dict[str, Any]] = {"strength": 0.0}  # the settings that turn it off

    class Config(Strength):
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            cls.name = cls.__module__.rsplit(".", 1)[-1]

    def __init__(self, **options: Any) -> None:
        self.auto = options.get("strength") == AUTO  # the strength follows the drift, from that of the settings on
        if self.auto:
            options = {key: value for key, value in options.items() if key != "strength"}
        self.config: Any = validated(self.Config, options, f"methods.{self.name}")
        if self.auto and not (self.boosts and "strength" in self.Config.model_fields):
            raise ConfigError(f"methods.{self.name}.strength: 'auto' has no effect here. It has with {_with_auto()}.")

    @property
    def active(self) -> bool:
        """False when the settings turn the method off; then it is left out entirely, bit for bit."""
        return any(getattr(self.config, key) != value for key, value in self.off.items())

    @property
    def needs(self) -> frozenset[str]:
        """What must be there: "old" (rows that stand for old data)."""
        return frozenset()

    @classmethod
    def reads_answers(cls) -> bool:
        """Whether it works on the supervised tokens of batches, or adds rows that have some."""
        hooks = ("batch_loss", "token_weights", "prepare_data")
        return any(getattr(cls, hook) is not getattr(Method, hook) for hook in hooks) or bool(cls.repeats_batches)

    @classmethod
    def clash(cls, other: type[Method]) -> str:
        """Why it cannot be combined with another method; "" when it can, as far as this one knows."""
        if other.name in cls.conflicts:
            return cls.conflicts[other.name]
        if cls.on_policy and (other.on_policy or other.reads_answers()):
            return f"{cls.name} learns from answers that the model writes, {other.name} from those of the rows"
        return ""

    def check_inputs(self, tokenizer: Any) -> None:
        """Find what is wrong with files and models that the settings name, before anything is written."""

    def check(self, tasks: Sequence[str] = ()) -> None:
        """Raise ConfigError for settings that cannot work together; called before anything is loaded.

        Args:
            tasks: names of all tasks of the run, where they are known.
        """

    def keeps_text(self, old: bool) -> str | None:
        """What text of given rows it would write into the run directory, and what to set instead; None for none.

        Args:
            old: whether the user gave rows that stand for old data.
        """
        return None

    @property
    def boosts(self) -> bool:
        """Whether `boost` has an effect: on a batch loss, where the stack applies it, or in a method of its own."""
        return type(self).batch_loss is not Method.batch_loss

    @property
    def weighs_tokens(self) -> bool:
        """Whether `token_weights` may give weights under these settings; where no method does, nothing is computed."""
        return type(self).token_weights is not Method.token_weights

    # -- once per task, before training ------------------------------------------------------------------
    def prepare_data(self, data: Mixture, run: Run) -> Mixture:
        """Add rows to what is trained on."""
        return data

    def prepare_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        """Freeze, wrap or extend the model, before the optimizer exists."""
        return model

    def on_model_ready(self, model: torch.nn.Module, run: Run) -> None:
        """Set weights that the task begins with: all methods have prepared the model, its start is not taken yet."""

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        """Take anchors and importances; `run.restored` says that `load_state_dict` was called before."""

    def learning_rates(self, model: torch.nn.Module, run: Run) -> dict[str, float]:
        """Factors on the learning rate, by parameter name; once, when the optimizer is made. 1 where not named."""
        return {}

    # -- inside the step ---------------------------------------------------------------------------------
    def token_weights(self, tokens: Tokens, run: Run) -> torch.Tensor | None:
        """Weights [N] ≥ 0, without gradient, of the supervised tokens in the main loss; None leaves them as they
        are. Those of several methods are multiplied. Use `Weighing` for a mean of 1."""
        return None

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        """A loss that depends on data: its *sum* over supervised tokens. The trainer divides by the same
        global token count as the main loss, so accumulation and ranks cannot change its weight."""
        return None

    def see_gradients(self, model: torch.nn.Module, run: Run) -> None:
        """Look at `.grad`, once per optimizer step, on the reduced gradient, before any method edits it."""

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        """Change `.grad` in place, once per optimizer step, on the reduced gradient, before clipping."""

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        """Move the weights after the optimizer did (not called for a skipped step)."""

    def see_step(self, model: torch.nn.Module, run: Run) -> None:
        """Look at the weights when all methods have moved them: record, average, measure."""

    # -- once per task, after training -------------------------------------------------------------------
    def finish_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        """Change the final weights; those with `finishes_last` come last."""
        return model

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        """Consolidate at the final weights: fill buffers, update importances, keep what the next task needs."""

    # -- resume ------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors that a resumed run needs and cannot make again cheaply."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state_dict` gave."""

    def __repr__(self) -> str:
        given = ({"strength": AUTO} if self.auto else {}) | self.config.model_dump(exclude_defaults=True)
        shown = ", ".join(f"{k}={v!r}" for k, v in given.items())
        return f"{type(self).__name__}({shown})"


class Stack(Method):
    """Several methods as one. Losses are kept apart by name; edits run in the order of the list.

    Raises:
        ConfigError: two methods that clash, or the same method twice.
    """

    name = "stack"

    def __init__(self, methods: Any = ()) -> None:
        given = [methods] if isinstance(methods, Method) else list(methods)
        for entry in given:
            if not isinstance(entry, Method):
                raise ConfigError(
                    f"methods: got {entry!r}; give method objects such as EWC(strength=1.0), or names in the YAML."
                )
        names = [m.name for m in given]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"methods: '{name}' is listed twice. Keep one.")
        self.methods = [m for m in given if m.active]
        for method in self.methods:
            for other in self.methods:
                reason = "" if other is method else type(method).clash(type(other))
                if reason:
                    raise ConfigError(
                        f"methods: '{method.name}' and '{other.name}' cannot be combined ({reason}). "
                        "Remove one of them."
                    )

    @property
    def active(self) -> bool:
        return bool(self.methods)

    @property
    def writer(self) -> Any:
        """The method that learns from answers which the model writes; None when there is none."""
        return next((m for m in self.methods if m.on_policy), None)

    def check_needs(self, available: frozenset[str], tasks: Sequence[str] = ()) -> None:
        """Raise ConfigError when a method lacks what it needs, or has settings that cannot work together."""
        advice = {
            "old": "give `old:` a file of rows that stand for old data, or set its source to 'self'",
        }
        for method in self.methods:
            method.check(tasks)
            for need in sorted(method.needs - available):
                raise ConfigError(f"methods.{method.name}: needs '{need}', which is missing; {advice[need]}.")

    def check_inputs(self, tokenizer: Any) -> None:
        for method in self.methods:
            method.check_inputs(tokenizer)

    def check_private(self, old: bool) -> None:
        """Raise ConfigError when a method would write text of given rows into the run directory.

        Args:
            old: whether the user gave rows that stand for old data.
        """
        for method in self.methods:
            if kept := method.keeps_text(old):
                raise ConfigError(f"methods.{method.name}: the run is private, but this {kept}.")

    def prepare_data(self, data: Mixture, run: Run) -> Mixture:
        for method in self.methods:
            data = method.prepare_data(data, run)
        return data

    def prepare_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        for method in sorted(self.methods, key=lambda m: (not m.adds_parameters, m.adds_on_top)):
            model = method.prepare_model(model, run)
        return model

    def on_model_ready(self, model: torch.nn.Module, run: Run) -> None:
        for method in self.methods:
            method.on_model_ready(model, run)

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        for method in self.methods:
            method.on_task_start(model, run)

    def learning_rates(self, model: torch.nn.Module, run: Run) -> dict[str, float]:
        factors: dict[str, float] = {}
        for method in self.methods:
            for name, factor in method.learning_rates(model, run).items():
                factors[name] = factors.get(name, 1.0) * factor
        return factors

    def token_weights(self, tokens: Tokens, run: Run) -> torch.Tensor | None:
        weights = None
        for method in self.methods:
            own = method.token_weights(tokens, run)
            if own is not None:
                weights = own.detach() if weights is None else weights * own.detach()
        return weights

    def batch_losses(self, batch: Batch, run: Run) -> dict[str, torch.Tensor]:
        """The batch losses of all methods, by name; sums over supervised tokens."""
        losses = {m.name: (m.batch_loss(batch, run), m.boost) for m in self.methods}
        return {
            name: loss if boost == 1 else boost * loss for name, (loss, boost) in losses.items() if loss is not None
        }

    def batch_loss(self, batch: Batch, run: Run) -> torch.Tensor | None:
        losses = list(self.batch_losses(batch, run).values())
        return torch.stack(losses).sum() if losses else None

    def edit_gradients(self, model: torch.nn.Module, run: Run) -> None:
        for method in self.methods:
            method.see_gradients(model, run)
        for method in sorted(self.methods, key=lambda m: m.turn):
            method.edit_gradients(model, run)
            if type(method).edit_gradients is not Method.edit_gradients and method.turn is not Turn.CLOSE:
                run.plain_gradient = False

    def on_step_end(self, model: torch.nn.Module, run: Run) -> None:
        for method in sorted(self.methods, key=lambda m: (m.restrains_steps, m.turn)):
            method.on_step_end(model, run)
        for method in self.methods:
            method.see_step(model, run)

    def finish_model(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        for method in sorted(self.methods, key=lambda m: m.finishes_last):
            model = method.finish_model(model, run)
        return model

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        for method in self.methods:
            method.on_task_end(model, run)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{m.name}/{key}": value for m in self.methods for key, value in m.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for method in self.methods:
            prefix = f"{method.name}/"
            method.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})

    def __repr__(self) -> str:
        return f"Stack({self.methods!r})"


def validated(schema: type[BaseModel], options: dict[str, Any], where: str) -> Any:
    """Build a settings object; a mistake becomes one line that names the setting.

    Raises:
        ConfigError: an unknown key (with the nearest one suggested) or a value that is not allowed.
    """
    try:
        return schema(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            *parents, name = (str(part) for part in first["loc"])
            raise ConfigError(unknown(".".join([where, *parents]), name, _fields(schema, parents))) from None
        setting = f"{where}.{key}" if key else where  # of several settings together
        raise ConfigError(f"{setting}: {first['msg']} (given: {first['input']!r}).") from None


def _with_auto() -> str:
    """Names of the methods whose strength can be found."""
    from retain.methods import load, names

    made = [load(name)() for name in names()]
    return ", ".join(m.name for m in made if m.boosts and "strength" in m.Config.model_fields)


def _fields(schema: Any, parents: list[str]) -> list[str]:
    """The settings that are allowed inside a setting, such as those of an entry of a list or a mapping."""
    for part in parents:
        schema = _given(schema)
        entries = typing.get_origin(schema) in (list, tuple, dict)
        schema = typing.get_args(schema)[-1] if entries else schema.model_fields[part].annotation
    return list(_given(schema).model_fields)


def _given(schema: Any) -> Any:
    """What a setting is where it is not null."""
    while type(None) in typing.get_args(schema):
        schema = typing.get_args(schema)[0]
    return schema
