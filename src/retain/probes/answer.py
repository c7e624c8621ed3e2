"""Question answering: the model writes, and what it wrote is compared with the accepted answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, get_args

from retain.data import text_scores
from retain.data.matching import contains, exact_match, token_counts, token_f1
from retain.errors import DataError, unknown
from retain.models.embedding import require_embeddings, similarities
from retain.models.generation import Generated
from retain.probes.asking import WrittenProbe
from retain.probes.base import Item, Outcome

#: Value of `score` → what the probe measures, and the detail that is its score.
SCORES = {
    "contains": ("accuracy", "contains"),
    "exact": ("exact match", "exact_match"),
    "f1": ("token F1", "f1"),
    "bleu": ("BLEU", "bleu"),
    "rouge_l": ("ROUGE-L", "rouge_l"),
    "keywords": ("keyword coverage", "keywords"),
    "similarity": ("similarity", "similarity"),
}


class Answer(WrittenProbe):
    """Fields `prompt`, `answers` (one text or a list), optional `max_tokens`.

    Options, for the probe or in an item:
        score: `contains` (default): right when an accepted answer appears in the text as whole words
            (`matching.contains`: case, accents, articles and punctuation do not matter, `7` is not in `72` or `7.5`);
            `exact`: right when the text is an accepted answer; `f1`, `bleu`, `rouge_l`, `keywords` and `similarity`:
            between 0 and 1, by token F1, BLEU, ROUGE-L, the band of key words covered, and the cosine of embeddings
            (below 0 as 0). One score for a probe.
        language: of the accepted answers, `en` or `zh`; told from them when not given.
        embedding: sentence-transformers model (folder or hub id) for `similarity`; one for a probe.

    Details hold all of these, the best over the accepted answers (BLEU: against all together), `similarity` where an
    embedding is named; and the counts from which micro F1 and corpus BLEU are made.
    """

    kind = "answer"
    metric = "accuracy"
    group = "knowledge"
    fields = frozenset({"prompt", "answers"})
    settings = frozenset({"max_tokens", "score", "language", "embedding"})
    max_tokens = 32

    def __init__(self, name: str, items: list[Item], group: str | None = None, **options: Any):
        super().__init__(name, items, group, **options)
        for item in self.items:
            where = f"probe '{name}', item '{item.id}'"
            accepted = _accepted(item)
            wrong = [x for x in accepted if not isinstance(x, str) or not x.strip()]
            if not accepted or wrong:
                raise DataError(
                    f"{where}: answers {item.fields['answers']!r} given; allowed is "
                    "a text, or a list of texts that are not empty."
                )
            for option, allowed in (("score", SCORES), ("language", get_args(text_scores.Language))):
                if (word := self.option(item, option)) is not None and word not in allowed:
                    raise DataError(unknown(f"{where}, {option}", str(word), allowed))
        self.score = self._one("score", "contains")
        self.embedding = self._one("embedding", None)
        self.metric, self._detail = SCORES[self.score]
        self.graded = self.score not in ("contains", "exact")
        if self.embedding is not None:
            require_embeddings(f"probe '{name}'")
        elif self.score == "similarity":
            raise DataError(
                f"probe '{name}': score similarity needs `embedding`, the folder or hub id of a sentence-transformers "
                "model."
            )

    def _one(self, option: str, default: str | None) -> Any:
        """The value of an option that must be the same for all items, as they are summed up together."""
        values = {str(v): v for item in self.items if (v := self.option(item, option, default)) is not None}
        if len(values) > 1:
            raise DataError(
                f"probe '{self.name}': its rows give {option} {', '.join(sorted(values))}; allowed is one for a probe. "
                "Give the rows another `probe`."
            )
        return next(iter(values.values()), default)

    def judge(self, item: Item, answer: Generated) -> tuple[float, str, dict[str, Any]]:
        """The score (similarity: 0 until `outcomes` has all texts), the reference and all scores."""
        accepted, text = _accepted(item), answer.text
        language = self.option(item, "language") or text_scores.language_of(" ".join(accepted))
        nearest = max(accepted, key=lambda one: token_f1(text, one))
        bleu, ngrams = text_scores.bleu(text, accepted, language)
        cover, band = max(text_scores.keyword_cover(text, one) for one in accepted)
        details: dict[str, Any] = {
            "contains": float(any(contains(text, one) for one in accepted)),
            "exact_match": float(any(exact_match(text, one) for one in accepted)),
            "f1": token_f1(text, nearest),
            "f1_counts": list(token_counts(text, nearest)),
            "bleu": bleu,
            "bleu_counts": ngrams,
            "rouge_l": text_scores.rouge_l(text, accepted, language),
            "keywords": band,
            "keyword_cover": cover,
        }
        reference = accepted[0] if len(accepted) == 1 else json.dumps(accepted, ensure_ascii=False)
        return float(details.get(self._detail, 0.0)), reference, details

    def outcomes(self, answers: Sequence[Generated], prompts: Sequence[str]) -> list[Outcome]:
        """Answers to the items, in their order, as rows; all texts are embedded together."""
        rows = super().outcomes(answers, prompts)
        if self.embedding is None:
            return rows
        cosines = similarities(self.embedding, [a.text for a in answers], [_accepted(item) for item in self.items])
        found = []
        for row, cosine in zip(rows, cosines):
            details = row.details | {"similarity": min(1.0, max(0.0, cosine)), "cosine": cosine}
            found.append(dataclasses.replace(row, score=float(details[self._detail]), details=details))
        return found


def _accepted(item: Item) -> list[str]:
    given = item.fields["answers"]
    return given if isinstance(given, list) else [given]
