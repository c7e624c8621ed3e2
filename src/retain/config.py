"""The run's configuration: one YAML file, validated before anything heavy is imported. No torch here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from retain import presets
from retain.errors import ConfigError, unknown
from retain.settings import (
    STARTER,
    BudgetConfig,
    ModelConfig,
    MonitorConfig,
    ProbeOptions,
    ProbesConfig,
    ReferenceConfig,
    Settings,
    TaskConfig,
    VerdictConfig,
)

__all__ = [
    "DEFAULT_METHODS",
    "PRIVATE_METHODS",
    "STARTER",
    "BudgetConfig",
    "ModelConfig",
    "MonitorConfig",
    "ProbeOptions",
    "ProbesConfig",
    "ReferenceConfig",
    "RunConfig",
    "TaskConfig",
    "VerdictConfig",
    "dump",
    "override",
    "parse",
    "read",
]

#: Used when a configuration names no methods. Needs no old data. How it was chosen: docs/log.md.
DEFAULT_METHODS: list[Any] = [
    {"lora": {"r": 16}},
    {"replay": {"fraction": 0.3, "max_tokens": 48}},
    {"distill": {"strength": 2.0}},
    {"interpolate": {"strength": 0.1}},
]

#: The same where no row may be kept.
PRIVATE_METHODS: list[Any] = [
    {name: settings | ({"buffer": 0} if name == "replay" else {})}
    for entry in DEFAULT_METHODS
    for name, settings in entry.items()
]

_POWER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class RunConfig(Settings):
    """A run: tasks learned in order by one model, with methods, measured before and after each."""

    name: str | None = None
    """Name of the run and of its folder; made from the tasks when not given."""
    model: ModelConfig = ModelConfig()
    """The base model; a plain string is its name."""
    tasks: list[TaskConfig] = Field(min_length=1)
    """What to learn, in order; a plain string is its data."""
    old: str | None = None
    """Rows that stand for what the model could do before; without them it writes its own."""
    methods: list[Any] = DEFAULT_METHODS
    """Names, or `name: {settings}`; `[none]` is plain fine-tuning."""
    preset: str | None = None
    """A recipe by name (`retain methods` lists them): its methods, unless methods are given, and training settings."""
    probes: ProbesConfig = ProbesConfig()
    """What is measured."""
    verdict: VerdictConfig = VerdictConfig()
    """From which numbers on a run is called what."""
    monitor: MonitorConfig | None = None
    """Looks while training, and what they lead to; `true` for the usual ones, none when not given."""
    budget: BudgetConfig | None = None
    """How much may be forgotten; a number, or `1%`, is `lose_at_most`; none when not given."""
    train: dict[str, Any] = {}
    """Any field of TRL's SFTConfig (a TrainingArguments): learning_rate, max_steps, bf16, …"""
    private: bool = False
    """No text of tasks and old rows is written to the run directory; methods that would store some are refused."""
    seed: int = 0
    """Seed of everything that is drawn."""
    language: Literal["en", "zh"] = "en"
    """Language of report.html and report.md."""
    output: str | None = None
    """Run directory; `runs/<name>` when not given."""
    _where: str = PrivateAttr("")

    @property
    def where(self) -> str:
        """What the settings were read from, for messages; "" when they were not."""
        return self._where

    def __eq__(self, other: object) -> bool:
        """Whether all settings are equal, whatever they were read from."""
        return isinstance(other, RunConfig) and self.model_dump() == other.model_dump()

    @model_validator(mode="before")
    @classmethod
    def _private_defaults(cls, values: Any) -> Any:
        values = _keys(values)
        if isinstance(values, dict) and values.get("private") is True and "methods" not in values:
            return values | {"methods": PRIVATE_METHODS}
        return values

    @field_validator("model", mode="before")
    @classmethod
    def _model_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("monitor", mode="before")
    @classmethod
    def _monitor_switch(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        return {"lose_at_most": value} if isinstance(value, int | float | str) else value

    @field_validator("train", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value  # YAML 1.1 reads 2e-4, which has no point, as text
        return {k: float(v) if isinstance(v, str) and _POWER.fullmatch(v) else v for k, v in value.items()}

    @field_validator("tasks", mode="before")
    @classmethod
    def _task_paths(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            value = [value]
        return [{"data": entry} if isinstance(entry, str) else entry for entry in value or []]

    @field_validator("methods", mode="before")
    @classmethod
    def _method_list(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return [{name: settings} for name, settings in value.items()]
        return [value] if isinstance(value, str) else value

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks; a repeated one gets a number."""
        names: list[str] = []
        for task in self.tasks:
            path = Path(task.data)
            stem = path.parent.name if path.stem in ("train", "test") else path.name.split(".")[0]
            name = base = task.name or stem or "task"
            number = 2
            while name in names:
                name, number = f"{base}-{number}", number + 1
            names.append(name)
        return names

    @property
    def title(self) -> str:
        """The run's name."""
        return self.name or "-".join(self.task_names)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.output) if self.output else Path("runs") / self.title


def parse(values: dict[str, Any], where: str = "configuration") -> RunConfig:
    """A configuration from plain values.

    Raises:
        ConfigError: an unknown key (with a suggestion), a missing one, or a value that is not allowed.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected settings such as `model:` and `tasks:`, got {type(values).__name__}.")
    try:
        config = RunConfig(**presets.filled(values))
    except ValidationError as error:
        raise ConfigError(_one_line(error, where)) from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}.") from None
    config._where = where
    return config


def read(path: str | Path, overrides: list[str] | None = None, preset: str | None = None) -> RunConfig:
    """A configuration from a YAML file, with dotted overrides such as `train.max_steps=20`, and a preset for it.

    Raises:
        ConfigError: no such file, not YAML, or as `parse`.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give a YAML file; `retain run --help` shows a short one.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f":{place.line + 1}" if place else ""
        problem = getattr(error, "problem", "") or "cannot be read"
        raise ConfigError(f"{path}{line}: not YAML ({problem}). Check indentation and quotes.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Save it as UTF-8 text.") from None
    if values is None or isinstance(values, dict):
        rest = [entry for entry in overrides or [] if not entry.startswith("preset=")]
        chosen = [entry.partition("=")[2] for entry in overrides or [] if entry.startswith("preset=")]
        wanted = chosen[-1] if chosen else preset
        values = (values or {}) | ({"preset": wanted} if wanted else {})
        values = override(presets.filled(_keys(values)), rest)
    return parse(values, str(path))


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `dotted.path=value` assignments; values are read as YAML, list entries by number.

    Raises:
        ConfigError: an assignment without `=`, or a path through something that has no such part.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"-o {assignment}: expected key=value, such as train.max_steps=20.")
        keys = path.strip().split(".")
        place: Any = values
        for i, key in enumerate(keys[:-1]):
            try:
                following = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
            except (ValueError, IndexError):
                raise ConfigError(
                    f"-o {assignment}: no entry '{key}' there; entries are numbered 0 to {len(place) - 1}."
                ) from None
            if not isinstance(following, dict | list):
                short = {"model": "name", "budget": "lose_at_most"}.get(keys[i], "data")
                following = {} if following is None or isinstance(following, bool) else {short: following}
                place[int(key) if isinstance(place, list) else key] = following
            place = following
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if isinstance(place, list):
            if not keys[-1].isdigit() or int(keys[-1]) >= len(place):
                raise ConfigError(f"-o {assignment}: entries are numbered 0 to {len(place) - 1}.")
            place[int(keys[-1])] = value
        else:
            place[keys[-1]] = value
    return values


def _keys(values: Any) -> Any:
    """The same with the key `on` as it was written: YAML 1.1 reads it as "true"."""
    if isinstance(values, dict):
        return {("on" if key is True else key): _keys(value) for key, value in values.items()}
    return [_keys(value) for value in values] if isinstance(values, list) else values


def dump(config: RunConfig) -> str:
    """The configuration as YAML, with every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _one_line(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"] if part != "entry")
    if first["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {
            "model": ModelConfig,
            "tasks": TaskConfig,
            "probes": ProbesConfig,
            "entry": ReferenceConfig,
            "verdict": VerdictConfig,
            "monitor": MonitorConfig,
            "budget": BudgetConfig,
        }
        schema: type[BaseModel] = RunConfig
        for part in first["loc"][:-1]:
            schema = parts.get(str(part), schema)
        if first["loc"][:2] == ("probes", "tasks"):
            schema = ProbeOptions
        parent = ".".join(str(part) for part in first["loc"][:-1] if part != "entry")
        return unknown(f"{where}: {parent}".rstrip(": "), str(first["loc"][-1]), schema.model_fields)
    if first["type"] == "missing":
        return f"{where}: `{path}` is missing. Add it; `retain run --help` shows a short configuration."
    return f"{where}: {path}: {first['msg']} (given: {first['input']!r})."
