"""What a search varies: settings by dotted path, each with a range or a list of values.

methods.distill.strength=0.1..10:log        a range, on a logarithmic scale
methods.replay.fraction=0..0.5              a range
methods.lora.r=4,8,16,32                    a list
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from retain.config import RunConfig, parse
from retain.errors import ConfigError, RetainError, unknown
from retain.methods.base import Method

FORMS = "LOW..HIGH, LOW..HIGH:log, or values with commas"
EXAMPLE = "--over methods.distill.strength=0.1..10:log"

#: Of methods that are searched when nothing is named.
RANKS = [4, 8, 16, 32, 64]
FRACTION = (0.0, 0.5)


@dataclass(frozen=True)
class Over:
    """A setting that is varied: between two numbers, or over the values of a list.

    Args:
        path: `methods.NAME.SETTING` or `train.SETTING`.
        low, high: ends of the range; unused with `values`.
        log: the range is one of orders of magnitude.
        whole: whole numbers alone.
        values: the list; empty for a range.
    """

    path: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    values: tuple[Any, ...] = ()

    def __str__(self) -> str:
        if self.values:
            return f"{self.path}={','.join(map(plain, self.values))}"
        return f"{self.path}={plain(self.low)}..{plain(self.high)}{':log' if self.log else ''}"

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be allowed for all of it to be."""
        return self.values or (self.number(self.low), self.number(self.high))

    def number(self, value: float) -> float | int:
        """A value of the range as the configuration takes it: whole, or short enough to be read."""
        return round(value) if self.whole else float(f"{value:.6g}")

    def points(self, count: int) -> list[Any]:
        """Values for a grid: those of the list, or so many from end to end of the range, evenly in its scale."""
        if self.values:
            return list(self.values)
        shares = [i / (count - 1) for i in range(count)]
        if self.log:
            found = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            found = [self.low + (self.high - self.low) * share for share in shares]
        return list(dict.fromkeys(map(self.number, found)))

    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values:
            return CategoricalDistribution(self.values)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a value of the configuration is one that could be tried."""
        if self.values:
            return value in self.values
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


def read_over(entries: Sequence[str], config: RunConfig) -> list[Over]:
    """What is varied, checked against a configuration: every end and value of it can be planned.

    Raises:
        ConfigError: a form that cannot be read, a path that leads nowhere or is given twice, a range that is none, or a
            value that is not allowed.
    """
    found: list[Over] = []
    for entry in entries:
        one = _read(entry, config)
        if one.path in [other.path for other in found]:
            raise ConfigError(f"--over {entry}: {one.path} is given twice. Give it once.")
        found.append(one)
    check(found, config)
    return found


def check(over: Iterable[Over], config: RunConfig) -> None:
    """Plan the configuration with every end and value, one setting at a time.

    Raises:
        ConfigError: one is not allowed, or would have no effect.
    """
    from retain.pipeline import plan

    for one in over:
        for value in one.ends:
            try:
                plan(applied(config, {one.path: value}))
            except RetainError as error:
                raise ConfigError(f"--over {one}: {plain(value)} is not possible. {error}") from None


def usual(config: RunConfig) -> list[Over]:
    """What is varied when nothing is named: strengths, replay share, LoRA rank and learning rate around their settings.

    Strengths over two orders of magnitude with the setting in the middle, or up to the largest value that the method
    allows; the share of replay from 0 to a half; ranks 4 to 64; the learning rate from a fifth to five times.
    """
    from retain.pipeline import plan

    planned = plan(config)
    found: list[Over] = []
    for method in planned.stack.methods:
        own, path = method.config, f"methods.{method.name}"
        strength = strength_of(method)
        if strength:
            high = min(10 * strength, largest(method))
            found.append(Over(f"{path}.strength", *_tidy(strength / 10, high), log=True))
        if method.name == "replay":
            found.append(Over(f"{path}.fraction", *FRACTION))
        if method.name == "lora" and own.r:
            found.append(Over(f"{path}.r", values=tuple(sorted({*RANKS, own.r}))))
    rate = float(planned.train["learning_rate"])
    found.append(Over("train.learning_rate", *_tidy(rate / 5, 5 * rate), log=True))
    check(found, config)
    return found


def strength_of(method: Method) -> float:
    """The strength that a method is set to; 0 where it has none."""
    found = getattr(method.config, "strength", 0.0)
    return float(found) if isinstance(found, int | float) else 0.0


def largest(method: Method) -> float:
    """The largest strength that a method allows; infinite where there is no end."""
    for rule in type(method.config).model_fields["strength"].metadata:
        if (most := getattr(rule, "le", None)) is not None:
            return float(most)
        if (below := getattr(rule, "lt", None)) is not None:
            return 0.99 * float(below)
    return math.inf


def applied(config: RunConfig, values: Mapping[str, Any], **own: Any) -> RunConfig:
    """The configuration with other values at some paths.

    Args:
        values: path → value.
        own: other top-level settings, such as `output`.

    Raises:
        ConfigError: a value that is not allowed.
    """
    given = config.model_dump(mode="json") | own
    methods: dict[str, dict[str, Any]] = {}
    for name, entry in zip(names(config), given["methods"]):
        methods[name] = dict((entry if isinstance(entry, dict) else {}).get(name) or {})
    tree = {"methods": methods, "train": given["train"]}
    for path, value in values.items():
        place: dict[str, Any] = tree
        *before, last = path.split(".")
        for key in before:
            place[key] = dict(place.get(key) or {})
            place = place[key]
        place[last] = value
    settings = {"methods": [{name: own} if own else name for name, own in tree["methods"].items()]}
    return parse(given | settings | {"train": tree["train"]}, config.where or "configuration")


def current(config: RunConfig, over: Iterable[Over]) -> dict[str, Any] | None:
    """The configuration's own values at these paths; None where one of them is not among what is tried."""
    from retain.pipeline import plan

    planned = plan(config)
    methods = {method.name: method.config.model_dump(mode="json") for method in planned.stack.methods}
    found: dict[str, Any] = {}
    for one in over:
        value: Any = {"methods": methods, "train": planned.train}
        for key in one.path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not one.holds(value):
            return None
        found[one.path] = value if one.values or one.whole else float(value)
    return found


def names(config: RunConfig) -> list[str]:
    """Names of the methods of a configuration, in their order."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in config.methods]


def _read(entry: str, config: RunConfig) -> Over:
    path, equals, text = (part.strip() for part in entry.partition("="))
    where = f"--over {entry}"
    if not equals or not text:
        raise ConfigError(f"{where}: expected PATH=RANGE with {FORMS}, such as {EXAMPLE}.")
    _check_path(path, where, config)
    body, _, scale = text.partition(":")
    if ".." not in body:
        if scale:
            raise ConfigError(f"{where}: a list takes no '{scale}'. Give {FORMS}.")
        return Over(path, values=_values(body, where))
    if scale not in ("", "log"):
        raise ConfigError(f"{where}: unknown scale '{scale}'. Give {FORMS}.")
    low, high = (_number(part.strip()) for part in body.split("..", 1))
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high)):
        raise ConfigError(f"{where}: the ends of a range are two numbers. Give {FORMS}.")
    if not low < high:
        raise ConfigError(f"{where}: {plain(low)} is not below {plain(high)}. Give the lower end first.")
    if scale and low <= 0:
        raise ConfigError(f"{where}: a logarithmic range begins above 0. Give a lower end such as {plain(high / 100)}.")
    whole = isinstance(low, int) and isinstance(high, int) and _is_whole(path)
    return Over(path, float(low), float(high), bool(scale), whole)


def _values(text: str, where: str) -> tuple[Any, ...]:
    try:
        found = [_number(value) if isinstance(value, str) else value for value in yaml.safe_load(f"[{text}]")]
    except yaml.YAMLError:
        raise ConfigError(f"{where}: '{text}' cannot be read. Give {FORMS}.") from None
    if any(not isinstance(value, str | int | float | bool | None) for value in found):
        raise ConfigError(f"{where}: the values of a list are numbers or words. Give {FORMS}.")
    if len(set(found)) < max(2, len(found)):
        raise ConfigError(f"{where}: a list has two values or more, all different. Give them, or set one with -o.")
    return tuple(found)


def _check_path(path: str, where: str, config: RunConfig) -> None:
    from retain import methods

    first, *rest = path.split(".")
    if first not in ("methods", "train") or not rest or not all(rest):
        raise ConfigError(f"{where}: '{path}' is not searched. Give methods.NAME.SETTING or train.SETTING.")
    if first == "train":
        if path == "train.bf16" and config.probes.precision == "auto":
            raise ConfigError(f"{where}: the probes follow it, and the base is asked once. Set `probes.precision`.")
        return
    if rest[0] not in names(config):
        if rest[0] in methods.names():
            raise ConfigError(f"{where}: the configuration has no method '{rest[0]}'. Add it to `methods`.")
        raise ConfigError(unknown(f"{where}: methods", rest[0], names(config)))
    fields = methods.load(rest[0]).Config.model_fields  # type: ignore[attr-defined]
    if len(rest) < 2 or rest[1] not in fields:
        raise ConfigError(unknown(f"{where}: methods.{rest[0]}", rest[1] if len(rest) > 1 else "", fields))


def _is_whole(path: str) -> bool:
    """Whether a setting takes whole numbers alone."""
    from trl import SFTConfig

    from retain import methods

    first, *rest = path.split(".")
    if first == "methods":
        return methods.load(rest[0]).Config.model_fields[rest[1]].annotation is int  # type: ignore[attr-defined]
    field = SFTConfig.__dataclass_fields__.get(rest[0])
    return field is not None and "int" in str(field.type) and "float" not in str(field.type)


def _number(text: str) -> Any:
    """A whole number, a decimal (also 1e-5, which YAML takes for a word), or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _tidy(low: float, high: float) -> tuple[float, float]:
    return float(f"{low:.3g}"), float(f"{high:.3g}")


def plain(value: Any) -> str:
    """A value as it is typed."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
