"""What is known of an expert: what it is for, what it learned and forgot, and how it was made. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from retain.results import Estimate

VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Learned(_Record):
    """The rows that an expert was trained on."""

    source: str  # file, folder or hub id
    rows: int  # that were trained on, each as often as it came
    test_rows: int = 0
    digest: str = ""  # of the training rows, as in the run's data.json


class Measured(_Record):
    """One probe before and after the training, on the same items; `difference` is after − before (`results.Change`)."""

    probe: str
    role: Literal["reference", "task"]
    metric: str
    before: float
    after: float
    difference: Estimate
    conclusion: str  # "lost", "kept", "gained", "cannot tell"


class Forgetting(_Record):
    """What the training cost and gained, over all probes (`results.Verdict`)."""

    value: float  # mean relative drop over the reference probes; positive = worse
    kept: Estimate | None = None  # mean change over the reference probes
    learned: Estimate | None = None  # mean gain over the task's own questions; positive = better
    sentence: str = ""


class ExpertCard(_Record):
    """An expert's card, `card.json` in its folder.

    What the weights say is found when the expert is added: `kind`, `rank` (the largest), `bytes` (of its tensors),
    `digest` (of its weights' file) and `base_digest` (`base.identity`; "" where the base's files were not here).
    """

    version: int = Field(VERSION, ge=1, le=VERSION)
    name: str
    base: str  # the model it is for: `starter`, a folder or a hub id
    base_digest: str = ""
    description: str = ""
    language: str = ""  # such as "en", "zh"; "" for any
    keywords: list[str] = []
    examples: list[str] = []  # questions for it, by which a router knows it
    data: Learned | None = None
    probes: list[Measured] = []
    forgetting: Forgetting | None = None
    training: dict[str, Any] = {}  # methods, settings, steps, versions
    created: str  # ISO 8601, UTC
    kind: str = "LORA"
    rank: int
    bytes: int
    digest: str

    def readme(self) -> str:
        """The card as the README.md of a model folder."""
        front = [
            "---",
            f"base_model: {self.base}",
            "library_name: peft",
            *([f"language: {self.language}"] if self.language else []),
            "---",
        ]
        text = [f"# {self.name}", self.description or f"An expert on `{self.base}`."]
        text.append(f"{self.kind}, rank {self.rank}, {self.bytes:,} bytes, added {self.created}.")
        if self.data:
            text.append(f"Trained on {self.data.rows:,} rows of `{self.data.source}`.")
        if self.forgetting and self.forgetting.sentence:
            text.append(self.forgetting.sentence)
        if self.probes:
            rows = ["| probe | before | after | difference | |", "| --- | ---: | ---: | ---: | --- |"]
            for m in self.probes:
                d = m.difference
                interval = f"{d.value:+.3f} ({d.low:+.3f} … {d.high:+.3f})"
                rows.append(
                    f"| {m.probe} ({m.metric}) | {m.before:.3f} | {m.after:.3f} | {interval} | {m.conclusion} |"
                )
            text.append("\n".join(rows))
        return "\n".join(front) + "\n\n" + "\n\n".join(text) + "\n"
