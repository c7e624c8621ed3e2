"""The sections of a run's configuration: model, tasks, probes, verdict, monitor, budget. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

STARTER = "starter"


class Settings(BaseModel):
    """A section: it cannot be changed, and knows no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Settings):
    """Which model, and how its weights are held."""

    name: str = STARTER
    """`starter`, a folder with a model or a PEFT adapter, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Type of the weights. With float32, `train: {bf16: true}` still computes in bfloat16."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen base in 4 or 8 bits (QLoRA); needs `lora` and the `qlora` extra."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class TaskConfig(Settings):
    """One thing to learn."""

    data: str
    """File (JSONL, CSV, Parquet), folder with train and test files, or hub id."""
    name: str | None = None
    """Short name for folders and tables; the file's name when not given."""
    test: str | None = None
    """Rows to measure what was learned; the folder's test file or held-out rows when not given. `same`: the training
    rows themselves, for facts that are to be remembered."""
    on: Literal["completion", "assistant", "all"] = "completion"
    """What is learned: the answer, every assistant turn, or everything."""
    columns: dict[str, str] | None = None
    """Our column name → the name in the data."""
    only: dict[str, list[Any]] | None = None
    """Column in the data → values: rows with other values are left out."""
    limit: int | None = Field(None, ge=1)
    """At most this many training rows, drawn with the seed."""
    test_limit: int | None = Field(None, ge=1)
    """At most this many test rows, held out or from a test file."""
    hold_out: float = Field(0.1, ge=0, lt=1)
    """Share of the rows held out when there is no test file, of texts two at least; 0 for none."""
    streaming: bool = False
    """Read rows as they are needed; for data that does not fit."""
    list_choices: bool = True
    """Question rows: list the choices in the prompt."""
    long: Literal["cut", "drop"] = "cut"
    """Rows longer than `train.max_length`, or than the model's context: cut at the end, or left out."""


class ProbeOptions(Settings):
    """How probe items are asked and scored, where a row does not say it itself; docs/probes.md tells what each does."""

    score: Literal["contains", "exact", "f1", "bleu", "rouge_l", "keywords", "similarity"] | None = None
    """What a written answer is compared by (`answer`)."""
    embedding: str | None = None
    """Folder or hub id of a sentence-transformers model, for `similarity` (`answer`)."""
    language: Literal["en", "zh"] | None = None
    """Language of the accepted answers (`answer`); told from them when not given."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer (kinds that let the model write)."""
    by: Literal["likelihood", "answer"] | None = None
    """How a label is chosen (`classification`)."""
    labels: list[str] | None = None
    """All labels (`classification`)."""
    normalisation: Literal["characters", "raw", "tokens", "unconditional"] | None = None
    """What a log-likelihood is divided by (`choice`, `classification`)."""
    layout: Literal["auto", "question", "continue", "chat"] | None = None
    """What is written around the prompt (`choice`, `classification`)."""
    window: int | None = Field(None, ge=2)
    """Longest piece of text that the model sees at once (`perplexity`, `divergence`)."""
    stride: int | None = Field(None, ge=1)
    """Tokens by which that window moves on (`perplexity`)."""
    top_k: int | None = Field(None, ge=1)
    """Likeliest tokens of the base that are kept of every position (`divergence`)."""
    samples: int | None = Field(None, ge=0)
    """Further answers that are drawn to every question (`hallucination`)."""
    temperature: float | None = Field(None, gt=0)
    """Of these answers (`hallucination`)."""

    def given(self) -> dict[str, Any]:
        """The options that are set."""
        return self.model_dump(include=set(ProbeOptions.model_fields), exclude_none=True)


class ReferenceConfig(ProbeOptions):
    """A source of reference probes with options."""

    data: str
    """Built-in suite, probe file or folder."""


def _name_or_entry(value: Any) -> str:
    return "name" if isinstance(value, str) else "entry"


class ProbesConfig(Settings):
    """What is measured before and after."""

    reference: list[
        Annotated[Annotated[str, Tag("name")] | Annotated[ReferenceConfig, Tag("entry")], Discriminator(_name_or_entry)]
    ] = ["core"]
    """Old abilities: built-in suites, probe files or folders, tasks of lm-evaluation-harness (`lm_eval:TASK`); with
    options as `{data: qa.jsonl, score: f1}`."""
    tasks: ProbeOptions = ProbeOptions()
    """Options of the probes that are made of the tasks' test rows."""
    limit: int | None = Field(None, ge=1)
    """At most this many items per reference probe (a fixed fair sample)."""
    task_limit: int | None = Field(200, ge=1)
    """At most this many items of each task's test rows."""
    between: Literal["all", "tasks"] = "all"
    """What is asked after a task that is not the last: all probes, or those of the tasks alone, which saves time in
    long sequences; old abilities are then asked at the base and after the last task."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the probes; auto is that of the training. All stages of a run are probed alike."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence of every interval."""

    def in_half(self, train: Mapping[str, Any]) -> bool:
        """Whether the probes are asked in bfloat16, beside a training of these settings."""
        return self.precision == "bfloat16" or (self.precision == "auto" and bool(train.get("bf16")))


class VerdictConfig(Settings):
    """From which numbers on a run is called what. Changes no training: a finished run may be judged anew."""

    keep_weight: float = Field(0.6, ge=0, le=1)
    """Weight of what was kept in the balance; both weights together are 1."""
    learn_weight: float = Field(0.4, ge=0, le=1)
    """Weight of what was learned in the balance."""
    max_forgetting: float = Field(0.2, ge=0, le=1)
    """Successful: the mean relative drop of old abilities is below this."""
    min_improvement: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Successful: the mean relative gain on the new tasks is above this."""
    min_reference: float = Field(0.7, ge=0, le=1)
    """Successful: the mean score on old abilities is above this."""
    alarm: float = Field(0.3, ge=0, allow_inf_nan=False)
    """An old ability that dropped by more than this, relative to before, is named."""
    margin: float = Field(0.02, ge=0, le=1)
    """Largest loss that counts as kept: 0.02 is 2 points."""
    margin_nats: float = Field(0.02, ge=0, allow_inf_nan=False)
    """The same for perplexity, in nats per token."""

    @model_validator(mode="after")
    def _weights(self) -> VerdictConfig:
        if abs(self.keep_weight + self.learn_weight - 1) > 1e-6:
            given = f"{self.keep_weight:g} + {self.learn_weight:g}"
            raise ValueError(f"keep_weight + learn_weight is {given}. Give both, so that they add up to 1")
        return self


class MonitorConfig(Settings):
    """How a training is watched for forgetting, and what is done about it."""

    every: int = Field(100, ge=1)
    """Optimizer steps from one look to the next; the last step has one too."""
    probes: list[str] = ["core"]
    """Old abilities to ask about: built-in suites, probe files or folders; `[]` for the anchors alone."""
    limit: int | None = Field(8, ge=2)
    """At most this many items per probe (a fixed fair sample)."""
    probes_every: int = Field(5, ge=1)
    """The probes are asked at every so many-th look, and where an anchor's number moved or an alarm is near."""
    anchors: str | None = None
    """Texts on which loss and divergence from the base are taken at every look: a .txt file, or rows with a column
    `text`; some of the core suite when not given."""
    anchor_count: int = Field(256, ge=2)
    """At most this many texts."""
    anchor_tokens: int = Field(64, ge=2)
    """At most this many tokens of each."""
    move: float = Field(0.05, gt=0, allow_inf_nan=False)
    """A rise of loss or divergence, in nats per token, that is worth a question: the probes are then asked. Not less
    than three times what the arithmetic alone changes."""
    max_forgetting: float = Field(0.3, gt=0, le=1)
    """Alarm: the mean relative drop of old abilities is above this."""
    patience: int = Field(2, ge=1)
    """Looks in a row above it before anything is done."""
    action: Literal["warn", "stop", "restore", "raise"] = "warn"
    """What an alarm does: say it; stop the training; stop it and put the best weights back; raise `raised`."""
    raised: str | None = None
    """For `raise`: `replay`, whose share grows, or the name of another method, whose strength grows."""
    factor: float = Field(2.0, gt=1, allow_inf_nan=False)
    """For `raise`: by how much, at every alarm."""
    most: float = Field(8.0, gt=1, allow_inf_nan=False)
    """For `raise`: the largest factor in all."""
    early_stop: int | None = Field(None, ge=1)
    """Stop when so many looks at the probes in a row brought no better `score`."""
    score: Literal["efficiency", "balance"] = "efficiency"
    """Which look is the best: stability-efficiency, or the balance of what was kept and what was learned."""
    checkpoint: bool = False
    """Write a checkpoint at every look."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence of every interval."""

    @model_validator(mode="after")
    def _has_effect(self) -> MonitorConfig:
        if (self.action == "raise") != (self.raised is not None):
            raise ValueError("`action: raise` and `raised` (a method) go together. Give both, or none")
        if not self.probes and (self.action != "warn" or self.early_stop):
            raise ValueError("an action and `early_stop` go by the probes, and there are none. Give `probes`")
        return self


class BudgetConfig(Settings):
    """How much may be forgotten: kept to while training, and made sure of afterwards."""

    lose_at_most: float = Field(0.02, gt=0, lt=1)
    """Largest mean loss over the probes that score between 0 and 1, against the base: 0.01 is one point."""
    lose_at_most_nats: float = Field(0.05, gt=0, allow_inf_nan=False)
    """The same for those that measure perplexity, in nats per token."""
    on: list[str] | None = None
    """What must be kept, as in `probes.reference`, where it is measured too; all that is named there when not given."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """How sure: the upper one-sided bound of the loss at this confidence must be inside the budget."""
    every: int = Field(10, ge=1)
    """Optimizer steps from one look at the drift to the next."""
    anchors: str | None = None
    """Texts on which the drift (divergence from the base) is taken, as in `monitor.anchors`; of the core suite, as
    chats if the model has a template, when not given."""
    anchor_count: int = Field(64, ge=2)
    """At most this many texts."""
    anchor_tokens: int = Field(96, ge=2)
    """At most this many tokens of each."""
    drift: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Largest drift to train to, in nats per token. Not given: from `lose_at_most`, set right by asking the probes."""
    calibrate: int = Field(3, ge=0)
    """How often in a task the probes are asked while training, to learn how many points a drift costs."""
    gain: float = Field(0.5, gt=0, le=2)
    """How fast strengths and replay share follow: the exponent of a look that is twice the limit."""
    least: float = Field(0.125, gt=0, le=1)
    """Smallest factor on the strengths."""
    most: float | None = Field(None, ge=1, allow_inf_nan=False)
    """Largest factor on the strengths, and on the replay share as far as a batch has room. Not given: 8, and 32 where a
    method has `strength: auto`, as nobody chose what it begins with."""
    jump: float = Field(0.5, gt=0, allow_inf_nan=False)
    """A rise of the drift between two looks above this share of the limit, or of the drift before if that is larger, is
    taken back in part (trust region)."""
    tries: int = Field(6, ge=1)
    """Most points between start and end that are asked about after training."""

    @field_validator("lose_at_most", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        return share(value)


def share(value: Any) -> float:
    """A loss as it is typed, as a share of the score: 0.01, "1%", "1pt" and "1 point" are one hundredth.

    Raises:
        ValueError: anything else, or a share that is not between 0 and 1.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*(%|pts?|points?)?\s*", str(value), re.IGNORECASE)
    if isinstance(value, bool) or not found:
        raise ValueError("no loss. Give a share of the score such as 0.01, or points: 1%, 1pt")
    number = float(found[1]) / (100 if found[2] else 1)
    if not 0 < number < 1:
        meant = f"; {found[1]} points are {found[1]}%" if not found[2] and 1 <= number < 100 else ""
        raise ValueError(f"a loss lies between 0 and 1 of the score: 0.01 is one point, as are 1% and 1pt{meant}")
    return number
