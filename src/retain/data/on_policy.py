"""Old prompts answered anew by the latest model; answers that pass a check are kept (OPR, arXiv:2605.29495).

Rows whose answers the model would give itself move it less than rows that somebody else wrote. Wrong ones do harm, so
each answer is compared with the stored one; prompts that never pass fall back to it, or are dropped. No model code is
here: `ask` may be a local model or any engine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from retain.data.checking import Check
from retain.data.demonstrations import BATCH, Ask, Progress, exchange
from retain.data.filters import PROBE_ITEM, Avoided

#: Of the answers after the first, which is greedy.
TEMPERATURE = 0.7


@dataclass
class PolicyReport:
    """What became of the prompts.

    Args:
        asked: prompts.
        passed: answer of the model, by the number of the try (1 is greedy) that passed.
        stored: fell back to the stored answer.
        dropped: left out.
        failed: why tries did not pass, over all tries.
        seconds: wall time.
    """

    asked: int = 0
    passed: Counter[int] = field(default_factory=Counter)
    stored: int = 0
    dropped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows that came of it."""
        return self.passed.total() + self.stored

    @property
    def fallback_rate(self) -> float:
        """Share of the prompts that never passed."""
        return (self.stored + self.dropped) / max(1, self.asked)

    def sentence(self) -> str:
        """One line for the user."""
        own, first = self.passed.total(), self.passed[1]
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.failed.most_common())
        return (
            f"{own} of {self.asked} prompts answered by the model itself ({first} at once, {own - first} when asked "
            f"again), {self.stored} with the stored answer, {self.dropped} dropped; {self.fallback_rate:.0%} never "
            f"passed the check, in {self.seconds:.0f} s" + (f" (tries: {reasons})" if reasons else "")
        )

    def as_json(self) -> dict[str, Any]:
        """For the file of the rows."""
        counts = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
        return counts | {"fallback_rate": self.fallback_rate}


def key_of(row: dict[str, Any]) -> str:
    """A hash of a row's prompt and stored answer."""
    return hashlib.blake2b(json.dumps(parted(row)).encode(), digest_size=8).hexdigest()


def parted(row: dict[str, Any]) -> tuple[list[dict[str, Any]], str] | None:
    """(turns of the prompt, stored answer) of a chat row; None where there is nothing to ask, as in plain texts."""
    turns = row.get("messages") or [*(row.get("prompt") or []), *(row.get("completion") or [])]
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        return None
    return turns[:-1], turns[-1]["content"]


def answer_anew(
    ask: Ask,
    rows: Sequence[dict[str, Any]],
    check: Check,
    limit: int,
    *,
    resample: int = 4,
    fallback: Literal["stored", "drop"] = "stored",
    avoid: Sequence[str] = (),
    progress: Progress = lambda done: None,
) -> tuple[list[dict[str, Any]], PolicyReport]:
    """Let a model answer old prompts; every prompt until an answer passes.

    The first answer is greedy, later ones are drawn at a temperature of 0.7.

    Args:
        ask: the latest model.
        rows: old rows in one of the trainer's chat forms.
        check: whether an answer is right.
        limit: tokens of an answer at most; one that was not finished does not pass.
        resample: how often a prompt is asked again at most.
        fallback: keep the stored answer of prompts that never pass, or leave them out.
        avoid: texts that an answer must not repeat, or it does not pass: the items of the probes.
        progress: called with the number of prompts just finished.

    Returns:
        Rows in the order given, each with `answer_of` ("model" or "stored") and the `key` of the row it is made of.
    """
    report, begun = PolicyReport(), time.perf_counter()
    parts = {place: found for place, row in enumerate(rows) if (found := parted(row)) is not None}
    report.asked, report.failed["no prompt to ask"] = len(rows), len(rows) - len(parts)
    answers: dict[int, str] = {}
    avoided = Avoided(avoid)
    left = list(parts)
    for number in range(1, resample + 2):
        for first in range(0, len(left), BATCH):
            asked = left[first : first + BATCH]
            said = ask([parts[i][0] for i in asked], limit, TEMPERATURE if number > 1 else 0.0, number)
            for place, (text, done) in zip(asked, said, strict=True):
                prompt, stored = parts[place]
                if not text or not done:
                    report.failed["not finished" if text else "empty"] += 1
                elif not check(text, stored, prompt):
                    report.failed["not right"] += 1
                elif avoided(text):
                    report.failed[PROBE_ITEM] += 1
                else:
                    answers[place] = text
                    report.passed[number] += 1
            progress(sum(place in answers for place in asked))
        left = [place for place in left if place not in answers]
    progress(len(rows) - len(answers))
    kept = []
    for place, row in enumerate(rows):
        if place in answers:
            kept.append(exchange(parts[place][0], answers[place]) | {"answer_of": "model", "key": key_of(row)})
        elif fallback == "stored" and place in parts:
            kept.append(exchange(*parts[place]) | {"answer_of": "stored", "key": key_of(row)})
            report.stored += 1
        else:
            report.dropped += 1
    report.failed += Counter()  # drops zero counts
    report.seconds = time.perf_counter() - begun
    return kept, report
