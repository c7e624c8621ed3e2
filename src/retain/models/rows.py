"""Rows of tokens with targets: what goes through a model when texts are scored, and how.

A row is a trunk, and branches behind it that see the trunk and themselves only:

    row        The capital of France is  Paris   Lyon   Nice , France
    position    0     1    2    3    4     5      5      5   6   7
    segment     0     0    0    0    0     1      2      3   3   3

`allowed(query, key) = key ≤ query and segment(key) ∈ {0, segment(query)}` is the attention mask. Logits are
made only at the positions that predict a target.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from retain.models.params import causal

Progress = Callable[[int], None]

LOGIT_NUMBERS = 2**28  # logits held at once; one gigabyte in float32
CPU_TOKENS = 1024  # larger batches leave the processor's caches: 20 % slower at 4096 (135 M, 2 cores)
_keeps: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


class Target(NamedTuple):
    """A token to predict."""

    place: int  # position in the row whose logits predict the token
    token: int
    owner: int  # index of the choice or window that the log-probability belongs to


@dataclass
class Row:
    """One sequence of a batch; `tokens`, `positions` and `segments` (0 = trunk) are of equal length."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    targets: list[Target]
    items: list[int] = field(default_factory=list)  # what is finished when this row is


@contextmanager
def looking(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module has the training flag that it had before."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def text_config(model: torch.nn.Module) -> Any:
    """The configuration of the language model, also inside a model for text and images."""
    config = causal(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def plain_row(context: list[int], own: list[int], owner: int) -> Row:
    """A row without branches: `context`, which is given, and `own`, every token of which is a target."""
    tokens = (context + own)[:-1]
    first = len(context) - 1
    return Row(
        tokens,
        list(range(len(tokens))),
        [0] * len(tokens),
        [Target(first + i, token, owner) for i, token in enumerate(own)],
    )


def branching_row(pairs: Sequence[tuple[list[int], list[int]]], group: Sequence[int]) -> Row:
    """All choices of one prompt in a row: what they share once, then one branch per choice."""
    inputs = {choice: (pairs[choice][0] + pairs[choice][1])[:-1] for choice in group}
    trunk = 0
    for column in zip(*inputs.values()):
        if len(set(column)) > 1:
            break
        trunk += 1
    row = Row(list(inputs[group[0]][:trunk]), list(range(trunk)), [0] * trunk, [])
    for segment, choice in enumerate(group, start=1):
        context, own = pairs[choice]
        offset = len(row.tokens) - trunk
        for i, token in enumerate(own, start=len(context) - 1):
            row.targets.append(Target(i if i < trunk else i + offset, token, choice))
        branch = inputs[choice][trunk:]
        row.tokens += branch
        row.positions += range(trunk, trunk + len(branch))
        row.segments += [segment] * len(branch)
    return row


def score_rows(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: list[Row],
    owners: int,
    batch_tokens: int,
    progress: Progress,
) -> list[float]:
    """Sum of the log-probabilities per owner. Rows of like length go together, the longest first."""
    pad, batches = _passes(model, tokenizer, rows, batch_tokens)
    parts: list[list[float]] = [[] for _ in range(owners)]
    waiting = [0] * (max((i for row in rows for i in row.items), default=-1) + 1)
    for row in rows:
        for item in row.items:
            waiting[item] += 1
    for batch in batches:
        for owner, value in forward_rows(model, pad, batch):
            parts[owner].append(value)
        finished = 0
        for row in batch:
            for item in row.items:
                waiting[item] -= 1
                finished += waiting[item] == 0
        if finished:
            progress(finished)
    return [math.fsum(values) for values in parts]


def row_logits(
    model: torch.nn.Module, tokenizer: Any, rows: list[Row], batch_tokens: int
) -> Iterator[tuple[Row, torch.Tensor]]:
    """Every row without branches with the logits [targets, V] that predict its targets; the longest rows first."""
    pad, batches = _passes(model, tokenizer, rows, batch_tokens)
    for batch in batches:
        logits, _ = _logits(model, pad, batch)
        yield from zip(batch, logits.split([len(row.targets) for row in batch]))


def _passes(
    model: torch.nn.Module, tokenizer: Any, rows: list[Row], batch_tokens: int
) -> tuple[int, Iterator[list[Row]]]:
    """The padding token, and the rows of every pass."""
    if causal(model).get_input_embeddings().weight.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    vocabulary = getattr(text_config(model), "vocab_size", None) or len(tokenizer)
    return pad, _batches(rows, batch_tokens, max(1, LOGIT_NUMBERS // vocabulary))


def _longest_first(pair: tuple[bool, Row]) -> tuple[bool, int]:
    return pair[0], -len(pair[1].tokens)


def _batches(rows: list[Row], batch_tokens: int, scored: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    places = 0
    # One kind of mask per pass: a row beyond a sliding window needs the model's own.
    for branching, row in sorted(((any(row.segments), row) for row in rows), key=_longest_first):
        if batch and (
            (len(batch) + 1) * len(batch[0].tokens) > batch_tokens
            or places + len(row.targets) > scored
            or branching != any(batch[0].segments)
        ):
            yield batch
            batch, places = [], 0
        batch.append(row)
        places += len(row.targets)
    if batch:
        yield batch


def forward_rows(model: torch.nn.Module, pad: int, rows: list[Row]) -> list[tuple[int, float]]:
    """One pass: (owner, log p) of every target. Padded on the right; at least float32 after the head."""
    logits, slots = _logits(model, pad, rows)
    wanted = [(slots[i][t.place], t.token) for i, row in enumerate(rows) for t in row.targets]
    slot, token = torch.tensor(wanted, device=logits.device).unbind(1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    normaliser = torch.cat([part.to(wide).logsumexp(-1) for part in logits.split(1024)])
    values = (logits[slot, token].to(wide) - normaliser[slot]).tolist()
    return list(zip([t.owner for row in rows for t in row.targets], values))


def _logits(model: torch.nn.Module, pad: int, rows: list[Row]) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [P, V] of one pass at the P places that predict a target, row by row; and row, place → index of these."""
    device = causal(model).get_input_embeddings().weight.device
    length = max(len(row.tokens) for row in rows)

    def table(lists: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([one + [fill] * (length - len(one)) for one in lists], device=device)

    ids = table([row.tokens for row in rows], pad)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        keep[i, [target.place for target in row.targets]] = True
    slots = (keep.flatten().cumsum(0) - 1).view(keep.shape).tolist()  # place in the row → row of the logits
    keep = keep.to(device)

    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if any(any(row.segments) for row in rows):
        inputs["position_ids"] = table([row.positions for row in rows], 0)
        segments = table([row.segments for row in rows], -1)
        key, query = segments[:, None, :], segments[:, :, None]
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        allowed = (past & ((key == 0) | (key == query)))[:, None]
        if getattr(text_config(model), "_attn_implementation", None) == "eager":
            dtype = floating(model)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
            inputs["attention_mask"] = mask.masked_fill_(~allowed, torch.finfo(dtype).min)
        else:
            inputs["attention_mask"] = allowed
    else:
        inputs["attention_mask"] = table([[1] * len(row.tokens) for row in rows], 0)
    if _keeps_positions(model):
        inputs["logits_to_keep"] = keep
    logits = model(**inputs).logits
    if logits.dim() == 3:
        logits = logits[:, -length:][keep]  # a learned prompt puts more positions in front
    return logits, slots


def _keeps_positions(model: torch.nn.Module) -> bool:
    """Whether `forward` takes a mask of positions as `logits_to_keep`; tried once, on two tokens."""
    if model not in _keeps:
        works = "logits_to_keep" in inspect.signature(causal(model).forward).parameters
        if works:
            device = causal(model).get_input_embeddings().weight.device
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            keep = torch.tensor([[False, True]], device=device)
            try:
                logits = model(input_ids=ids, attention_mask=ids + 1, logits_to_keep=keep, use_cache=False).logits
                works = logits.dim() == 2 and len(logits) == 1
            except (RuntimeError, TypeError, IndexError, ValueError):
                works = False
        _keeps[model] = works
    return _keeps[model]


def floating(model: torch.nn.Module) -> torch.dtype:
    """dtype of the activations; quantised weights are integers and say nothing about it."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
