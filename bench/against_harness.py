"""Rows of the table about multiple choice: the same items by lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from side_by_side import Line, Settings, in_turn, ratio

from retain.models.likelihood import choice_log_likelihoods
from retain.models.load import load_model
from retain.probes.base import Outcome, Subject
from retain.probes.choice import Choice
from retain.probes.suite import load_probes

_TOKENS = 1024  # padded tokens of a forward pass
_TIE = 1e-3


@dataclass
class Count:
    """Forward passes and their padded tokens."""

    passes: int = 0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return self.tokens / max(1, self.passes)


@contextmanager
def counted(model: torch.nn.Module, count: Count) -> Any:
    """Count the forward passes of a block."""

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        count.passes += 1
        count.tokens += (args[0] if args else kwargs["input_ids"]).numel()

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def items(settings: Settings) -> Choice:
    """The choice items of a file, or of the core suite, as one probe."""
    found = [p for p in load_probes(settings.items or "core") if isinstance(p, Choice)]
    every = [item for probe in found for item in probe.items]
    step = max(1, len(every) // settings.count)  # over all files and all of each
    chosen = every[::step][: settings.count]
    return Choice("items", chosen, **(found[0].options if found else {}))


def requests(prompts: Sequence[str], probe: Choice) -> list[Any]:
    """What the harness is asked: the very prompts that the probe asks, with every choice."""
    from lm_eval.api.instance import Instance

    pairs = [
        (prompt, ("" if prompt[-1:].isspace() else " ") + choice)
        for prompt, item in zip(prompts, probe.items, strict=True)
        for choice in item.fields["choices"]
    ]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def predictions(scores: Sequence[float], choices: Sequence[str]) -> dict[str, tuple[int, float]]:
    """(best choice, lead over the second) by `acc` and `acc_norm` of the harness."""
    found = {}
    for name, values in {
        "acc": list(scores),
        "acc_norm": [score / max(1, len(choice)) for score, choice in zip(scores, choices)],
    }.items():
        first, second = sorted(values, reverse=True)[:2]
        found[name] = (values.index(first), first - second)
    return found


def choice(settings: Settings) -> list[Line]:
    """Time and predictions of the choice probe against lm-evaluation-harness, both in float32."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(settings.model)
    subject = Subject(model, tokenizer, chat=False, batch_tokens=_TOKENS)
    probe = items(settings)
    # one pass over all items, in as many parts as there are pairs: every pair is of other items
    parts = [Choice("part", probe.items[i :: settings.repeats], **probe.options) for i in range(settings.repeats)]
    parts = [part for part in parts if part.items]
    prompts = [[part._layout(item, subject) for item in part.items] for part in parts]
    asked = [requests(one, part) for one, part in zip(prompts, parts)]
    pairs = [request.args for one in asked for request in one]
    mean = sum(len(ids) for ids in tokenizer([a + b for a, b in pairs])["input_ids"]) / len(pairs)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=max(1, round(_TOKENS / mean)))
    ours, theirs = Count(), Count()
    outcomes: list[list[Outcome]] = [[] for _ in parts]
    scores: list[list[float]] = [[] for _ in parts]

    def probed(i: int) -> None:
        with counted(model, ours):
            outcomes[i] = parts[i].look(subject)

    def harnessed(i: int) -> None:
        with counted(model, theirs):
            scores[i] = [value for value, _ in harness.loglikelihood(asked[i], disable_tqdm=True)]

    choice_log_likelihoods(model, tokenizer, prompts[0][:1], [[a[1] for a in pairs[:2]]])
    harness.loglikelihood(asked[0][:2], disable_tqdm=True)
    times = in_turn(probed, harnessed, len(parts))

    compared = differing = 0
    for part, seen, given in zip(parts, outcomes, scores):
        position = 0
        for item, outcome in zip(part.items, seen, strict=True):
            texts = item.fields["choices"]
            mine = predictions(outcome.details["log_likelihoods"], texts)
            other = predictions(given[position : position + len(texts)], texts)
            position += len(texts)
            clear = [kind for kind in mine if min(mine[kind][1], other[kind][1]) > _TIE]
            compared += bool(clear)
            differing += any(mine[kind][0] != other[kind][0] for kind in clear)
    total = len(probe.items)
    detail = (
        f"{total} items in {len(parts)} parts, each answered by both; {ours.mean:.0f} padded tokens a forward pass "
        f"({ours.passes} passes) against {theirs.mean:.0f} ({theirs.passes})"
    )
    same = (
        f"the best choice by log-likelihood and by log-likelihood per character; {compared} of {total} items lead "
        f"by more than {_TIE:g}."
    )
    work = f"multiple choice, {total} items"
    return [
        ratio(work, "lm-evaluation-harness", times, 0.5, detail),
        Line("items answered differently", "lm-evaluation-harness", differing, 0, unit="items", detail=same),
    ]
