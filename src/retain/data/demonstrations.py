"""New rows like a few that are shown: inputs by in-context learning, answers by the latest model, a diverse subset.

Self-synthesised rehearsal (SSR, arXiv:2403.01244): a model that is shown a few inputs of old rows writes others of
their kind; the model as it is now answers them; k-means over what the inputs are about keeps rows of every kind. No
model code is here: `ask` may be a local model or any engine.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from retain.data.filters import Filters, NearDuplicates, Sieve
from retain.data.synthesis import Report
from retain.errors import DataError

#: (prompts: turns or plain text, most new tokens, temperature, draw) → [text, whether it was finished] for each.
Ask = Callable[[list[Any], int, float, int], list[Any]]
Progress = Callable[[int], None]

FIRST = "Write a request that somebody could send to an assistant. Write the request only."
NEXT = "Write another request of this kind, about something else."
_MARK = "### Request"  # opens each request where there is no chat template
BATCH = 32


def questions(rows: Sequence[dict[str, Any]], where: str = "old") -> list[str]:
    """The inputs of rows: what the user says first; each text once.

    Raises:
        DataError: no row has one (plain texts have none).
    """
    found: dict[str, None] = {}
    for row in rows:
        turns = row.get("prompt") or row.get("messages") or []
        first = next((turn["content"] for turn in turns if turn["role"] == "user"), None)
        if first:
            found[first.strip()] = None
    if not found:
        raise DataError(f"{where}: no row has a prompt that could be shown. Give rows with prompt and response.")
    return list(found)


def write_inputs(
    ask: Ask,
    shown_texts: Sequence[str],
    number: int,
    seed: int = 0,
    *,
    chat: bool = True,
    shown: int = 4,
    filters: Filters | None = None,
    temperature: float = 1.0,
    specials: Sequence[str] = (),
    tries: float = 6.0,
    progress: Progress = lambda kept: None,
) -> tuple[list[str], Report]:
    """Let a model write inputs like those that it is shown.

    Args:
        ask: the model; with a deterministic one the inputs depend on `seed` alone.
        shown_texts: inputs of old rows.
        number: inputs wanted.
        seed: of the order in which demonstrations are shown.
        chat: whether prompts are turns, where each demonstration is an answer of the assistant, or plain text.
        shown: demonstrations in a prompt; all are shown equally often.
        filters: what an input must be like.
        specials: tokens that no input may hold.
        tries: give up after tries · number.
        progress: called with the number of inputs just kept.

    Raises:
        DataError: not one usable input was written.
    """
    report, begun = Report(), time.perf_counter()
    filters = filters or Filters()
    near_shown = NearDuplicates(filters.similarity)
    for text in shown_texts:
        near_shown.add(text)
    sieve = Sieve(number, filters, report.dropped)
    deal = rotated(shown_texts, shown, seed)
    kept: list[str] = []
    most, draw = max(BATCH, math.ceil(tries * number)), 0
    while len(kept) < number and report.tried < most:
        prompts = [invitation(next(deal), chat) for _ in range(min(BATCH, most - report.tried))]
        before = len(kept)
        for text, done in ask(prompts, filters.prompt_tokens, temperature, draw):
            report.tried += 1
            text, done = (text.strip(), done) if chat else _first_block(text, done)
            if text and near_shown.seen(text):
                report.dropped["near a demonstration"] += 1
            elif sieve.instruction(text, done, specials):
                kept.append(text)
        report.dropped["not needed"] += max(0, len(kept) - number)
        del kept[number:]
        progress(len(kept) - before)
        draw += 1
    report.dropped += Counter()  # drops zero counts
    report.kept, report.seconds = len(kept), time.perf_counter() - begun
    if not kept:
        raise DataError(
            f"demonstrations: no usable input was written ({report.sentence()}). Give other rows to show, or let the "
            "model write freely (`source: self`)."
        )
    return kept, report


def write_answers(
    ask: Ask,
    inputs: Sequence[str],
    limit: int,
    specials: Sequence[str] = (),
    filters: Filters | None = None,
    progress: Progress = lambda done: None,
) -> tuple[list[dict[str, Any]], Report]:
    """Let a model answer inputs, greedily: rows as `prompt`/`completion` chats; unusable ones are dropped and counted.

    Raises:
        DataError: not one answer can be used.
    """
    report, begun = Report(tried=len(inputs)), time.perf_counter()
    sieve = Sieve(len(inputs), filters or Filters(), report.dropped)
    rows = []
    for first in range(0, len(inputs), BATCH):
        part = list(inputs[first : first + BATCH])
        answers = ask([[{"role": "user", "content": text}] for text in part], limit, 0.0, 0)
        for text, (answer, done) in zip(part, answers, strict=True):
            if sieve.response(text, answer, done, specials):
                rows.append(exchange([{"role": "user", "content": text}], answer))
        progress(len(part))
    report.kept, report.seconds = len(rows), time.perf_counter() - begun
    if not rows:
        raise DataError(
            f"demonstrations: no answer could be used ({report.sentence()}). Raise `max_tokens` where they were not "
            "finished, or give other rows to show."
        )
    return rows, report


def exchange(prompt: Sequence[dict[str, Any]], answer: str) -> dict[str, Any]:
    """A row of the trainer's prompt and completion form."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    return {"prompt": turns, "completion": [{"role": "assistant", "content": answer}]}


def rotated(texts: Sequence[str], shown: int, seed: int) -> Iterator[list[str]]:
    """Groups of `shown` different texts without end; every text comes equally often, in a new order each time."""
    random = np.random.default_rng(seed)
    size = min(shown, len(texts))
    left: list[int] = []
    while True:
        group: list[int] = []
        while len(group) < size:
            left = left or random.permutation(len(texts)).tolist()
            # behind the end of a pass a text may be in the group already: then it waits for the next one
            place = next((i for i, text in enumerate(left) if text not in group), None)
            if place is None:
                left += random.permutation(len(texts)).tolist()
            else:
                group.append(left.pop(place))
        yield [texts[i] for i in group]


def invitation(shown: Sequence[str], chat: bool) -> Any:
    """A prompt after which a model writes one more text like those shown."""
    if not chat:
        return "".join(f"{_MARK}\n{text}\n\n" for text in shown) + f"{_MARK}\n"
    turns = []
    for number, text in enumerate(shown):
        turns += [{"role": "user", "content": NEXT if number else FIRST}, {"role": "assistant", "content": text}]
    return [*turns, {"role": "user", "content": NEXT}]


def _first_block(text: str, done: bool) -> tuple[str, bool]:
    """What stands before the next request that a model without chat template goes on to write."""
    first, mark, _ = text.partition(_MARK.split()[0])
    return first.strip(), done or bool(mark)
