"""Other numbers of a whole probe than its score, from what the details of its items hold."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from retain.functional import probe_totals
from retain.items import Rows
from retain.results import ClassNumbers, Totals

#: Means over the items of written answers: name → detail.
_MEANS = {
    "macro_f1": "f1",
    "contains": "contains",
    "exact_match": "exact_match",
    "bleu": "bleu",
    "rouge_l": "rouge_l",
    "keywords": "keywords",
    "similarity": "similarity",
}


def totals(rows: Rows) -> Totals:
    """The numbers of one probe at one stage; none for a probe of another kind than `answer` and `classification`.

    Written answers: `micro_f1` (over all tokens at once), `macro_f1` (mean of the items' token F1), `corpus_bleu` (over
    all n-grams at once), and the means `contains`, `exact_match`, `bleu`, `rouge_l`, `keywords` and, where an embedding
    was named, `similarity`. Classes: `accuracy`, `macro_f1`, and precision, recall and F1 of each by its label, or by
    its place in the list in a run that keeps no text.

    Args:
        rows: the rows of one probe (`results.ITEM_COLUMNS`).
    """
    details = [json.loads(row["details"] or "{}") for row in rows]
    if details and all("classes" in one for one in details):
        return _of_classes(details)
    if details and all("bleu_counts" in one and "f1_counts" in one for one in details):
        return _of_answers(details)
    return Totals()


def _of_classes(details: list[dict[str, Any]]) -> Totals:
    truth, chosen = ([one[key] for one in details] for key in ("answer", "chosen"))
    macro, found = probe_totals.class_scores(truth, chosen, details[0]["classes"])
    names = details[0].get("labels") or [str(i) for i in range(len(found))]
    right = sum(a == b for a, b in zip(truth, chosen))
    return Totals(
        numbers={"accuracy": right / len(details), "macro_f1": macro},
        classes={name: ClassNumbers(**numbers._asdict()) for name, numbers in zip(names, found)},
    )


def _of_answers(details: list[dict[str, Any]]) -> Totals:
    there = {name: key for name, key in _MEANS.items() if all(key in one for one in details)}
    return Totals(
        numbers={name: float(np.mean([one[key] for one in details])) for name, key in there.items()}
        | {
            "micro_f1": probe_totals.micro_f1([one["f1_counts"] for one in details]),
            "corpus_bleu": probe_totals.corpus_bleu([one["bleu_counts"] for one in details]),
        }
    )
