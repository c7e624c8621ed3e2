"""Ask a model all probes: one pass over the items, the written answers of all probes in shared batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, TypeGuard

from retain.models.generation import Generated, Prompt, generate, has_chat_template, render
from retain.probes.base import Item, Outcome, Probe, Progress, Subject


class WrittenProbe(Probe):
    """A probe whose items the model answers in its own words. A kind overrides `judge`.

    The answer is greedy, through the chat template where there is one. A field `max_tokens` of an item, or
    the option of the probe, limits its length.
    """

    max_tokens: ClassVar[int] = 64
    settings = frozenset({"max_tokens"})
    written = True  # False in a probe that was told not to let the model write
    graded = False  # True where a score between 0 and 1 is neither right nor wrong

    def limit(self, item: Item) -> int:
        """Most tokens that the answer to an item may have."""
        return int(item.fields.get("max_tokens") or self.options.get("max_tokens") or self.max_tokens)

    def times(self, item: Item) -> int:
        """How often a question is asked."""
        return 1

    def judge(self, item: Item, answer: Generated) -> tuple[float, str, dict[str, Any]]:
        """Score (0 to 1), reference as a text, and what else is to be kept."""
        raise NotImplementedError

    def outcomes(self, answers: Sequence[Generated], prompts: Sequence[str]) -> list[Outcome]:
        """Answers to the items, in their order, as rows."""
        rows = []
        for item, answer, prompt in zip(self.items, answers, prompts, strict=True):
            score, reference, details = self.judge(item, answer)
            details |= {"written": answer.tokens, "finished": answer.finished}
            if answer.truncated:
                details["truncated"] = answer.truncated
            right = None if self.graded else score == 1.0
            rows.append(Outcome(item.id, prompt, reference, answer.text, float(score), right, details=details))
        return rows

    def asked_again(self, subject: Subject, outcomes: list[Outcome]) -> list[Outcome]:
        """The rows with what more the model says to the same questions; a kind that samples overrides it."""
        return outcomes

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Ask every item; outcomes in the order of `self.items`."""
        return look_together([self], subject, progress)[0]


def is_written(probe: Probe) -> TypeGuard[WrittenProbe]:
    """Whether the model answers in its own words."""
    return isinstance(probe, WrittenProbe) and probe.written


def look_together(
    probes: Sequence[WrittenProbe], subject: Subject, progress: Progress = lambda n: None
) -> list[list[Outcome]]:
    """Outcomes of every probe; all prompts go into the same batches."""
    items = [(probe, item) for probe in probes for item in probe.items]
    shown, prompts = shown_to(subject, [item for _, item in items])
    answers = generate(
        subject.model,
        subject.tokenizer,
        shown,
        max_new_tokens=[probe.limit(item) for probe, item in items],
        batch_tokens=subject.batch_tokens,
        progress=progress,
    )
    found, start = [], 0
    for probe in probes:
        end = start + len(probe.items)
        found.append(probe.asked_again(subject, probe.outcomes(answers[start:end], prompts[start:end])))
        start = end
    return found


def shown_to(subject: Subject, items: Sequence[Item]) -> tuple[list[Prompt], list[str]]:
    """Prompts of items as `generate` takes them, through the chat template where there is one, and as texts."""
    chat = subject.chat and has_chat_template(subject.tokenizer)
    messages = [[{"role": "user", "content": item.fields["prompt"]}] for item in items]
    prompts = [render(subject.tokenizer, message, chat) for message in messages]
    return list(messages if chat else prompts), prompts


def ask(probes: Sequence[Probe], subject: Subject, progress: Progress = lambda n: None) -> list[dict[str, Any]]:
    """Ask all probes; rows of the item table (`results.ITEM_COLUMNS`) in the order of probes and items.

    Args:
        probes: what to measure; the order of their items never changes.
        subject: the model under test.
        progress: called with the number of items just finished; they add up to the items of all probes.
    """
    written = [probe for probe in probes if is_written(probe)]
    answered = iter(look_together(written, subject, progress) if written else [])
    rows = []
    for probe in probes:
        outcomes = next(answered) if is_written(probe) else probe.look(subject, progress)
        rows += [_row(probe, outcome) for outcome in outcomes]
    return rows


def are_answers(rows: Sequence[dict[str, Any]], probes: Sequence[Probe]) -> bool:
    """Whether rows that were kept are what `ask` gives for exactly these items."""
    return [(row["probe"], row["item"]) for row in rows] == [(p.name, item.id) for p in probes for item in p.items]


def _row(probe: Probe, outcome: Outcome) -> dict[str, Any]:
    return {
        "probe": probe.name,
        "item": outcome.item,
        "prompt": outcome.prompt,
        "reference": outcome.reference,
        "output": outcome.output,
        "score": float(outcome.score),
        "correct": outcome.correct,
        "tokens": outcome.tokens,
        "details": json.dumps(outcome.details, ensure_ascii=False, sort_keys=True),
    }
