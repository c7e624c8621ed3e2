"""The rules of advice, as tables: of each the first line that holds is taken. No torch here.

A line says when it holds (for the program and in words), what it gives, why, and where that is from. `documents()`
writes them all as Markdown; docs/advise.md holds what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from retain.advice.scenario import Scenario
from retain.functional import freezing, strengths

BETHUNE = "Bethune et al. 2025, arXiv:2502.06042"
MEASURED = "docs/log.md"
RULE = "rule of thumb"
STAGES = "BY_SIZE in retain.functional.strengths"
FREEZING = "table in retain.functional.freezing"


@dataclass(frozen=True)
class Rule:
    """One line of a table; `value` may depend on the scenario."""

    when: Callable[[Scenario], bool]
    said: str
    value: Any
    why: str
    source: str

    def of(self, scenario: Scenario) -> Any:
        """What it gives here."""
        return self.value(scenario) if callable(self.value) else self.value


def _always(scenario: Scenario) -> bool:
    return True


def _freeze(s: Scenario) -> float:
    low, high = freezing.recommended_share(s.parameters, s.similarity)
    return round((low + high) / 2, 3)


def _ewc(s: Scenario) -> float:
    low, high = strengths.recommended(s.parameters).ewc
    return float(f"{(low * high) ** 0.5:.2g}")


def _epochs(s: Scenario) -> int:
    return max(1, min(4, round(800 / s.rows)))


def _length(s: Scenario) -> int:
    return max(64, -(-s.longest // 32) * 32)


#: Which recipe (`retain.advice.recipes`) comes first.
RECIPE = (
    Rule(lambda s: s.private, "private", "private", "no text of the rows may be kept: the model replays "
         "pseudo-samples of its own with the outputs it had for them, and is its own teacher", "preset `private`"),
    Rule(lambda s: s.room == "plenty" and s.tasks > 1 and s.serve == "any", "memory for two full trainings, several "
         "tasks, any way of serving", "blocks", "each task learns in new blocks, those of earlier ones stay",
         "preset `rich`"),
    Rule(lambda s: s.tasks > 2 or (s.parameters >= 7e9 and s.tasks > 1), "three tasks or more; two on 7 billion "
         "parameters or more", "sequence", "a slow adapter follows a fast one: late tasks do not undo early ones",
         "preset `advanced`"),
    Rule(lambda s: not s.old and s.room in ("half", "quantised", "none"), "no old rows, little memory", "weights",
         "importance of weights and the model's own past take no old rows and no second model", "preset `small`"),
    Rule(lambda s: s.old, "old rows", "ewc and replay", "old rows in every batch, and weights held by their importance",
         "preset `basic`"),
    Rule(_always, "otherwise", "own rows", "rows that the model writes stand for old data; a teacher on them and a "
         "small step back keep the rest", f"default methods; {MEASURED}"),
)  # fmt: skip

#: Other recipes that a pilot may try, in this order.
ALTERNATIVES = ("own rows", "ewc and replay", "frozen layers", "weights", "sequence")

FREEZE = (
    Rule(lambda s: s.parameters >= freezing.SMALLEST, "1 billion parameters or more", _freeze,
         "bottom layers hold what is general; the middle of the range for the size and the similarity", FREEZING),
    Rule(_always, "smaller models", _freeze, "the range for 1 to 7 billion, as there is none below", FREEZING),
)  # fmt: skip

EWC = (
    Rule(lambda s: s.parameters >= 7e9, "7 billion parameters or more", _ewc,
         "raw units, the geometric middle of the range for the size", STAGES),
    Rule(lambda s: s.old, "old rows", 1.0, "normalised units (importances have mean 1); replay does part of the work",
         "preset `basic`"),
    Rule(_always, "otherwise", 1.0, "normalised units (importances have mean 1)", "preset `small`"),
)  # fmt: skip

#: (rank, layers): how much an adapter may learn.
RANK = (
    Rule(lambda s: s.closeness == "near", "similarity above 0.8", (8, "qv"), "near what the model knows: few "
         "directions are enough, and lose less", "Hu et al. 2021, arXiv:2106.09685; `lora: {domain: near}`"),
    Rule(lambda s: s.room in ("half", "quantised", "none"), "little memory", (8, "all"), "gradients and states of a "
         "small adapter", "preset `small`"),
    Rule(lambda s: s.closeness == "middle", "similarity 0.5 to 0.8", (16, "all"), "a neighbouring domain",
         "Biderman et al. 2024, arXiv:2405.09673"),
    Rule(_always, "below 0.5", (32, "all"), "far from what the model knows: there is much to learn",
         "Biderman et al. 2024, arXiv:2405.09673; `lora: {domain: far}`"),
)  # fmt: skip

REPLAY_SHARE = (
    Rule(lambda s: s.old and not s.short and s.closeness == "near", "old rows, a long run, near", 0.05,
         "a little general data stops the loss of what is general", BETHUNE),
    Rule(lambda s: s.old and not s.short and s.closeness == "middle", "old rows, a long run, middle", 0.1,
         "between the two", RULE),
    Rule(lambda s: s.old and s.closeness != "far", "old rows, near or middle", 0.15,
         "15 % general rows when a domain is learned; a short run shows few of them", "docs/methods/replay.md"),
    Rule(lambda s: s.old, "old rows, far", 0.25, "what is far moves the weights more", "docs/methods/replay.md"),
    Rule(lambda s: s.parameters < 1e9 or s.closeness == "far", "own rows; below 1 billion parameters or far", 0.3,
         "self-written rows stand for old data only in part, and small models lose more", f"{MEASURED}; {BETHUNE}"),
    Rule(_always, "own rows otherwise", 0.2, "self-written rows stand for old data only in part", MEASURED),
)  # fmt: skip

DISTILL = (
    Rule(lambda s: s.private or (not s.old and s.room in ("half", "quantised", "none")), "private, or little memory "
         "and no old rows", 0.5, "all rows are new ones, and a strong teacher would keep them from being learned",
         "presets `private`, `small`"),
    Rule(_always, "otherwise", 2.0, "on replayed rows the teacher is right: it may be strong", MEASURED),
)  # fmt: skip

#: (weights, quantisation).
WEIGHTS = (
    Rule(lambda s: s.room in ("quantised", "none"), "bfloat16 weights do not fit", ("auto", "4bit"),
         "4 bits a weight, adapters in float32 (QLoRA)", "Dettmers et al. 2023, arXiv:2305.14314"),
    Rule(lambda s: s.room == "half", "float32 weights do not fit", ("bfloat16", "none"),
         "half the memory; adapters are trained on top", RULE),
    Rule(_always, "otherwise", ("float32", "none"), "small steps are not lost to rounding", RULE),
)  # fmt: skip

LEARNING_RATE = (
    Rule(lambda s: s.parameters >= 1e9, "adapters, 1 billion parameters or more", 2e-4,
         "about ten times that of full fine-tuning", "Biderman et al. 2024, arXiv:2405.09673"),
    Rule(_always, "adapters, smaller models", 1e-3, "that of the default recipe as it was measured",
         MEASURED),
)  # fmt: skip
FULL_RATE = (
    Rule(lambda s: s.parameters >= 1e9, "all weights, 1 billion parameters or more", 1e-5,
         "a low rate is the strongest free protection", RULE),
    Rule(_always, "all weights, smaller models", 1e-4, "as in preset `separate`", "preset `separate`"),
)  # fmt: skip
BLOCKS_RATE = (Rule(_always, "new blocks", 2e-4, "blocks begin as no change", "preset `rich`"),)

EPOCHS = (
    Rule(lambda s: s.rows < 560, "fewer than 560 rows", _epochs, "about a hundred steps of eight rows; more repeats "
         "forget more", RULE),
    Rule(_always, "otherwise", 1, "each further pass forgets more and learns less", RULE),
)  # fmt: skip

BATCH = (
    Rule(lambda s: s.room in ("half", "quantised", "none"), "little memory", (1, 8, True),
         "one row at a time, activations computed again, eight rows a step", "retain plan"),
    Rule(lambda s: s.longest > 1024, "rows of more than 1,024 tokens", (2, 4, True), "long rows hold many activations",
         "retain plan"),
    Rule(_always, "otherwise", (8, 1, False), "the usual batch", RULE),
)  # fmt: skip

LENGTH = (
    Rule(_always, "always", _length, "99 of 100 rows are whole", "measured on the rows"),
)  # fmt: skip

#: Table → its title and what its values are, as the documentation shows them.
TABLES: dict[str, tuple[Sequence[Rule], Callable[[Any], str]]] = {
    "Recipe": (RECIPE, str),
    "`freeze.share`": (FREEZE, str),
    "`ewc.strength`": (EWC, str),
    "`lora.r`, `lora.targets`": (RANK, lambda v: f"{v[0]}, {v[1]}"),
    "`replay.fraction`": (REPLAY_SHARE, str),
    "`distill.strength`": (DISTILL, str),
    "`model.dtype`, `model.quantize`": (WEIGHTS, lambda v: f"{v[0]}, {v[1]}"),
    "`train.learning_rate`, adapters": (LEARNING_RATE, lambda v: f"{v:g}"),
    "`train.learning_rate`, all weights": (FULL_RATE, lambda v: f"{v:g}"),
    "`train.learning_rate`, blocks": (BLOCKS_RATE, lambda v: f"{v:g}"),
    "`train.num_train_epochs`": (EPOCHS, str),
    "rows at once, accumulation, checkpointing": (BATCH, lambda v: f"{v[0]}, {v[1]}, {'yes' if v[2] else 'no'}"),
    "`train.max_length`": (LENGTH, str),
}


def first(rules: Sequence[Rule], scenario: Scenario) -> Rule:
    """The line that holds."""
    return next(rule for rule in rules if rule.when(scenario))


def documents() -> str:
    """All tables as one Markdown table."""
    rows = ["| setting | when | value | why | source |", "| --- | --- | --- | --- | --- |"]
    for title, (rules, shown) in TABLES.items():
        for rule in rules:
            value = _BY_SCENARIO.get(rule.value, "by the scenario") if callable(rule.value) else shown(rule.value)
            rows.append(f"| {title} | {rule.said} | {value} | {rule.why} | {rule.source} |")
    return "\n".join(rows)


_BY_SCENARIO: dict[Any, str] = {
    _freeze: "0.55 to 0.97",
    _ewc: "7,100 to 22,000, `units: raw`",
    _epochs: "2 to 4",
    _length: "a multiple of 32",
}
