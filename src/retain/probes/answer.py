"""Question answering: the model writes, and an accepted answer must be in what it wrote."""

from __future__ import annotations

import json
from typing import Any

from retain.data.matching import contains, exact_match, token_f1
from retain.errors import DataError
from retain.models.generation import Generated
from retain.probes.asking import WrittenProbe
from retain.probes.base import Item


class Answer(WrittenProbe):
    """Fields `prompt`, `answers` (one text or a list), optional `max_tokens`.

    Right when an accepted answer appears in the text as whole words (`matching.contains`: case, accents,
    articles and punctuation do not matter, `7` is not in `72` or `7.5`). Details hold the best exact match and
    token F1 over the accepted answers.
    """

    kind = "answer"
    metric = "accuracy"
    group = "knowledge"
    fields = frozenset({"prompt", "answers"})
    max_tokens = 32

    def __init__(self, name: str, items: list[Item], group: str | None = None, **options: Any):
        super().__init__(name, items, group, **options)
        for item in self.items:
            accepted = _accepted(item)
            wrong = [x for x in accepted if not isinstance(x, str) or not x.strip()]
            if not accepted or wrong:
                raise DataError(
                    f"probe '{name}', item '{item.id}': answers {item.fields['answers']!r} given; allowed is "
                    "a text, or a list of texts that are not empty."
                )

    def judge(self, item: Item, answer: Generated) -> tuple[float, str, dict[str, Any]]:
        """1 when an accepted answer is there, otherwise 0."""
        accepted = _accepted(item)
        text = answer.text
        right = any(contains(text, one) for one in accepted)
        details = {
            "exact_match": float(any(exact_match(text, one) for one in accepted)),
            "f1": max(token_f1(text, one) for one in accepted),
        }
        reference = accepted[0] if len(accepted) == 1 else json.dumps(accepted, ensure_ascii=False)
        return float(right), reference, details


def _accepted(item: Item) -> list[str]:
    given = item.fields["answers"]
    return given if isinstance(given, list) else [given]
