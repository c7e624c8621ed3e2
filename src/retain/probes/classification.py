"""Classification: one label out of a list that all items of the probe share."""

from __future__ import annotations

from typing import Any

from retain.data.matching import contains, exact_match
from retain.errors import DataError, unknown
from retain.models.generation import Generated
from retain.probes.asking import WrittenProbe
from retain.probes.base import Item, Outcome, Progress, Subject
from retain.probes.choice import Choice

_WAYS = ("likelihood", "answer")


class Classification(WrittenProbe):
    """Fields `prompt`, `labels` (two or more texts, the same list for the whole probe), `label` (one of them).

    Rows that say `kind: classification` may leave `labels` to another row of the probe, or to the option.

    Options, for the probe (`by` also in its rows):
        by: `likelihood` (default): the label that the model finds most likely after the prompt, measured as `choice`
            does, with its options `normalisation` and `layout`; `answer`: the model writes, and its label is the one
            that its text is, or else the only one that it contains as whole words. A label within a longer one that is
            there (`spam` in `no spam`) does not count; no label, or several, is wrong.
        labels: the list, where no row gives it.

    The score is accuracy. `retain.totals` makes macro F1 and the numbers of every class from the details `answer` and
    `chosen`, which are indices of labels; `chosen` is null without a label.
    """

    kind = "classification"
    metric = "accuracy"
    group = "capability"
    fields = frozenset({"prompt", "labels", "label"})
    shared = frozenset({"labels"})
    settings = frozenset({"by", "labels", "normalisation", "layout", "max_tokens"})
    max_tokens = 16

    def __init__(self, name: str, items: list[Item], group: str | None = None, **options: Any):
        super().__init__(name, items, group, **options)
        self.labels = self._labels()
        for item in self.items:
            where = f"probe '{name}', item '{item.id}'"
            if (label := item.fields["label"]) not in self.labels:
                raise DataError(unknown(f"{where}, label", str(label), self.labels))
            if (way := self.option(item, "by", "likelihood")) not in _WAYS:
                raise DataError(unknown(f"{where}, by", str(way), _WAYS))
        ways = {self.option(item, "by", "likelihood") for item in self.items}
        if len(ways) > 1:
            raise DataError(f"probe '{name}': its rows say by likelihood and by answer; allowed is one for a probe.")
        self.written = ways == {"answer"}
        same = [a for a in self.labels if any(a != b and exact_match(a, b) for b in self.labels)]
        if self.written and same:
            raise DataError(
                f"probe '{name}': labels {', '.join(same)} cannot be told apart in a written answer, where case and "
                "punctuation do not matter. Give them other names, or by: likelihood."
            )
        of_choice = {key: value for key, value in self.options.items() if key in Choice.settings}
        self._choice = Choice(name, [self._as_choice(item) for item in self.items], group, **of_choice)

    def _labels(self) -> list[str]:
        """The one list that rows or options give."""
        given = [item.fields["labels"] for item in self.items if "labels" in item.fields]
        given = given or [self.options.get("labels")]
        for labels in given:
            right = isinstance(labels, list) and all(isinstance(one, str) and one.strip() for one in labels)
            if not right or len(labels) < 2 or len({one.strip().casefold() for one in labels}) < len(labels):
                raise DataError(
                    f"probe '{self.name}': labels {labels!r} given; allowed is a list of two or more different texts."
                )
            if labels != given[0]:
                raise DataError(
                    f"probe '{self.name}': labels {labels!r} given, and {given[0]!r} before; allowed is one list for a "
                    "probe. Give the rows another `probe`."
                )
        return list(given[0])

    def _as_choice(self, item: Item) -> Item:
        fields = {key: value for key, value in item.fields.items() if key in {"prompt", *Choice.settings}}
        return Item(item.id, fields | {"choices": self.labels, "answer": self.labels.index(item.fields["label"])})

    @property
    def chance(self) -> float | None:
        """1/labels by likelihood; None for written answers, which need not be a label at all."""
        return None if self.written else 1 / len(self.labels)

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Score every item; outcomes in the order of `self.items`."""
        if self.written:
            return super().look(subject, progress)
        rows = self._choice.look(subject, progress)
        for row in rows:
            row.details.update(self._about())
        return rows

    def judge(self, item: Item, answer: Generated) -> tuple[float, str, dict[str, Any]]:
        """1 when the label in the text is the right one."""
        right, found = self.labels.index(item.fields["label"]), label_in(answer.text, self.labels)
        return float(found == right), self.labels[right], {"answer": right, "chosen": found} | self._about()

    def _about(self) -> dict[str, Any]:
        return {"classes": len(self.labels), "labels": self.labels}


def label_in(text: str, labels: list[str]) -> int | None:
    """Index of the label that a text is, or else of the only one that it contains; None where there is no such one."""
    for i, label in enumerate(labels):
        if exact_match(text, label):
            return i
    there = [i for i, label in enumerate(labels) if contains(text, label)]
    whole = [i for i in there if not any(i != j and contains(labels[j], labels[i]) for j in there)]
    return whole[0] if len(whole) == 1 else None
