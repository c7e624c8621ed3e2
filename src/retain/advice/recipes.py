"""Recipes: which methods go together, where each can be used, and their settings by the tables. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retain.advice import rules
from retain.advice.rules import Rule
from retain.advice.scenario import Scenario
from retain.functional.freezing import SMALLEST


@dataclass(frozen=True)
class Choice:
    """One setting of the advised configuration.

    Args:
        setting: dotted path as in `-o`, methods by name: `replay.fraction`, `train.learning_rate`.
        value: what it is set to.
        why: one sentence.
        source: the table, paper or measurement that it is from.
    """

    setting: str
    value: Any
    why: str
    source: str


@dataclass(frozen=True)
class Recipe:
    """Methods that go together.

    Args:
        methods: in the order of the configuration.
        fits: where it can be used at all.
        weights: what is trained: "adapter", "all" or "blocks".
    """

    methods: tuple[str, ...]
    fits: Callable[[Scenario], bool]
    weights: str = "adapter"


def _adapters(s: Scenario) -> bool:
    return True


def _alone(s: Scenario) -> bool:
    return s.serve == "any" and s.room == "plenty"


RECIPES: dict[str, Recipe] = {
    "private": Recipe(("lora", "der", "distill"), lambda s: s.private),
    "blocks": Recipe(("blocks", "replay"), _alone, "blocks"),
    "sequence": Recipe(("lora", "ilora", "label_smoothing", "replay"), lambda s: s.room not in ("quantised", "none")),
    "weights": Recipe(("lora", "ewc", "distill"), _adapters),
    "ewc and replay": Recipe(("lora", "ewc", "replay"), _adapters),
    "own rows": Recipe(("lora", "replay", "distill", "interpolate"), _adapters),
    "frozen layers": Recipe(
        ("freeze", "replay", "distill"), lambda s: s.serve != "adapters" and s.room in ("plenty", "enough"), "all"
    ),
}


def ordered(scenario: Scenario, most: int = 3) -> list[str]:
    """Names of the recipes for a scenario, the advised one first; at least one."""
    begin = rules.first(rules.RECIPE, scenario).of(scenario)
    begin = begin if RECIPES[begin].fits(scenario) else "own rows"
    others = [name for name in rules.ALTERNATIVES if name != begin and RECIPES[name].fits(scenario)]
    return [begin, *others][:most]


def _by(setting: str, rule: Rule, value: Any) -> Choice:
    return Choice(setting, value, rule.why, rule.source)


def method_choices(name: str, scenario: Scenario) -> list[tuple[str, list[Choice]]]:
    """The methods of a recipe with the settings of each, in order."""
    recipe, s = RECIPES[name], scenario
    listed = list(recipe.methods)
    if s.parameters >= SMALLEST and recipe.weights == "adapter":
        listed.insert(1, "freeze")  # adapters on frozen bottom layers
    if "interpolate" in listed and (s.lose_at_most is not None or _quantised(s)):
        listed.remove("interpolate")  # a budget goes back as far as is needed; a quantised base has one adapter for all
    return [(method, _SETTINGS[method](s)) for method in listed]


def _quantised(s: Scenario) -> bool:
    return rules.first(rules.WEIGHTS, s).of(s)[1] != "none"


def _lora(s: Scenario) -> list[Choice]:
    rule = rules.first(rules.RANK, s)
    rank, targets = rule.of(s)
    return [
        _by("lora.r", rule, rank),
        Choice("lora.alpha", 2 * rank, "twice the rank, so that the scale is 2 at every rank", "docs/methods/lora.md"),
        Choice("lora.targets", targets, "q and v are enough for what is near" if targets == "qv" else
               "all linear layers learn most at a given rank", "Biderman et al. 2024, arXiv:2405.09673"),
    ]  # fmt: skip


def _ewc(s: Scenario) -> list[Choice]:
    rule = rules.first(rules.EWC, s)
    found = [_by("ewc.strength", rule, rule.of(s))]
    if s.parameters >= 7e9:
        found.append(Choice("ewc.units", "raw", "the range by size is given in these units", rules.STAGES))
    samples = 128 if s.room in ("half", "quantised", "none") else 256
    return [
        *found,
        Choice("ewc.samples", samples, "rows for the importances; a few hundred are enough", "preset `basic`"),
    ]


def _replay(s: Scenario) -> list[Choice]:
    rule = rules.first(rules.REPLAY_SHARE, s)
    source = "old" if s.old and not s.private else "self"
    where = "your old rows" if source == "old" else "conversations that the model writes with itself before it learns"
    found = [
        _by("replay.fraction", rule, rule.of(s)),
        Choice("replay.source", source, f"what stands for old data: {where}", "docs/methods/replay.md"),
    ]
    if source == "self":
        found.append(Choice("replay.max_tokens", 48, "long rows weigh more and take longer to write", rules.MEASURED))
    if s.private:
        found.append(Choice("replay.buffer", 0, "no row of a task is kept", "private"))
    return found


def _distill(s: Scenario) -> list[Choice]:
    rule = rules.first(rules.DISTILL, s)
    return [_by("distill.strength", rule, rule.of(s))]


def _freeze(s: Scenario) -> list[Choice]:
    rule = rules.first(rules.FREEZE, s)
    return [_by("freeze.share", rule, rule.of(s))]


def _der(s: Scenario) -> list[Choice]:
    found = [
        Choice("der.buffer", 0, "no row of a task is kept", "private"),
        Choice("der.source", "self", "rows of the model's own, none of yours", "private"),
        Choice("der.old", 128, "pseudo-samples with their outputs", "preset `private`"),
    ]
    if s.tasks > 1:
        found.append(
            Choice(
                "der.own", 32, "after each task the model writes rows in place of the task's", "examples/private.yaml"
            )
        )
    return found


def _ilora(s: Scenario) -> list[Choice]:
    return [
        Choice("ilora.decay", 0.9, "how slowly the slow adapter follows", "preset `advanced`"),
        Choice("ilora.consistency", 1.0, "hidden states stay near those of the slow adapter", "preset `advanced`"),
    ]


#: Method → its settings.
_SETTINGS: dict[str, Callable[[Scenario], list[Choice]]] = {
    "lora": _lora,
    "ewc": _ewc,
    "replay": _replay,
    "distill": _distill,
    "freeze": _freeze,
    "der": _der,
    "ilora": _ilora,
    "label_smoothing": lambda s: [
        Choice("label_smoothing.strength", 0.1, "softer targets move the weights less", "preset `advanced`")
    ],
    "interpolate": lambda s: [
        Choice("interpolate.strength", 0.1, "a tenth of the way back costs little of what was learned", rules.MEASURED)
    ],
    "blocks": lambda s: [Choice("blocks.every", 4, "a new block behind every fourth", "preset `rich`")],
}


def train_choices(name: str, scenario: Scenario) -> list[Choice]:
    """Settings of the training."""
    table = {"adapter": rules.LEARNING_RATE, "all": rules.FULL_RATE, "blocks": rules.BLOCKS_RATE}[RECIPES[name].weights]
    rate, epochs, batch, length = (rules.first(t, scenario) for t in (table, rules.EPOCHS, rules.BATCH, rules.LENGTH))
    rows, together, again = batch.of(scenario)
    found = [
        _by("train.learning_rate", rate, rate.of(scenario)),
        _by("train.num_train_epochs", epochs, epochs.of(scenario)),
        _by("train.per_device_train_batch_size", batch, rows),
        _by("train.gradient_accumulation_steps", batch, together),
        _by("train.max_length", length, length.of(scenario)),
    ]
    if again:
        found.append(
            Choice("train.gradient_checkpointing", True, "a third slower, and far fewer activations", "retain plan")
        )
    return found


def model_choices(scenario: Scenario) -> list[Choice]:
    """How the weights are held."""
    rule = rules.first(rules.WEIGHTS, scenario)
    dtype, quantize = rule.of(scenario)
    return [_by("model.dtype", rule, dtype), _by("model.quantize", rule, quantize)]
