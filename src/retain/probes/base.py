"""The probe protocol: a fixed set of items that measures one ability, asked the same way every time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Item:
    """One question of a probe.

    `fields` holds what the kind needs: `prompt`, `answers`, `choices`, `answer`, `good`, `bad`, `text`,
    `check`, `safe`. `id` is stable: given in the file, else a hash of the fields.
    """

    id: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a model did with one item; one row of the item table (`results.ITEM_COLUMNS`)."""

    item: str
    prompt: str
    reference: str
    output: str
    score: float
    correct: bool | None = None
    tokens: int = 1
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """The model under test, with what is needed to ask it.

    Args:
        model: a causal language model; evaluated in eval mode, its training flag is put back afterwards.
        tokenizer: its tokenizer.
        chat: ask through the chat template (only where there is one).
        batch_tokens: padded tokens per forward pass; lower it when memory runs out.
    """

    model: torch.nn.Module
    tokenizer: Any
    chat: bool = True
    batch_tokens: int = 4096


#: Called with the number of items just finished.
Progress = Callable[[int], None]


class Probe:
    """A named set of items of one kind. A kind is one file with one subclass, which overrides `look`."""

    kind: ClassVar[str]
    metric: str  # of the kind, or of a probe whose options say what is measured
    group: str = "capability"  # knowledge | capability | behaviour, unless the items say otherwise
    higher_is_better: ClassVar[bool] = True
    fewest: ClassVar[int] = 1  # items without which there is no interval: right or wrong has one from the first on
    fields: ClassVar[frozenset[str]]  # what a row must have; how a file without `kind` is recognised

    def __init__(self, name: str, items: Sequence[Item], group: str | None = None, **options: Any):
        self.name, self.items, self.options = name, list(items), options
        self.group = group or type(self).group

    @property
    def chance(self) -> float | None:
        """Expected score of blind guessing, or None where guessing is hopeless."""
        return None

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Ask every item; outcomes in the order of `self.items`."""
        raise NotImplementedError


def texts_of_items(probes: Iterable[Probe]) -> list[str]:
    """What items show to a model, without wrong answers: texts that rows written for replay must not repeat."""
    fields = [item.fields for probe in probes for item in probe.items]
    return [text for f in fields for key in ("prompt", "text", "good") if isinstance(text := f.get(key), str)]
