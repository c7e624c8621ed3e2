"""Log-likelihoods of answers and texts: exact and batched.

A prompt and all its choices go through the model once: the tokens that all choices have in common are the
trunk of a row, what differs are branches behind it (`retain.models.rows`). Tokens, prefixes and windows are
those of lm-evaluation-harness (`_encode_pair`, `get_rolling_token_windows`), so numbers can be compared.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from retain.errors import DataError, ModelError
from retain.models.load import known_context
from retain.models.rows import (
    Progress,
    Row,
    branching_row,
    floating,
    forward_rows,
    looking,
    plain_row,
    score_rows,
    text_config,
)

_BRANCHING_ATTENTION = {"sdpa", "eager"}  # implementations that take a mask of our own
_BRANCHING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of the choices of one prompt; every list has one entry per choice.

    Args:
        log_likelihoods: log p(choice | prompt) in nats, summed over the tokens of the choice.
        tokens: number of tokens that were summed.
        characters: number of characters of the choice, without the space in front of it.
        truncated: tokens cut from the left of the longest sequence because it exceeded the context.
    """

    log_likelihoods: list[float]
    tokens: list[int]
    characters: list[int]
    truncated: int = 0


@dataclass(frozen=True)
class TextScore:
    """Log-likelihood of one text in nats, the number of tokens summed, and in how many windows."""

    log_likelihood: float
    tokens: int
    windows: int


class _Ability(NamedTuple):
    branches: bool  # scores branches as it scores plain rows
    reach: int  # longest sequence for which that holds (sliding windows); plain beyond


_abilities: weakref.WeakKeyDictionary[torch.nn.Module, _Ability] = weakref.WeakKeyDictionary()


def context_length(model: torch.nn.Module, tokenizer: Any) -> int:
    """Longest input in tokens: from the text config, else from the tokenizer, else 2048."""
    return known_context(text_config(model), tokenizer) or 2048


def prefix_token(tokenizer: Any) -> int:
    """The token before the first one: BOS, else EOS.

    Raises:
        ModelError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ModelError("tokenizer: has neither a BOS nor an EOS token to put before a text. Set tokenizer.eos_token.")


def encode(tokenizer: Any, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
    """Token ids of every text.

    Args:
        special: add the tokenizer's special tokens; None adds them unless the text already starts with its
            BOS (a rendered chat does), so that there are never two.
    """
    if not texts:
        return []
    if special is not None:
        return tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    bos = tokenizer.bos_token or tokenizer.eos_token
    given = [bool(bos) and text.startswith(bos) for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    for flag in (True, False):
        chosen = [i for i, value in enumerate(given) if value is flag]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=not flag, verbose=False)
            encoded = encoded["input_ids"]
            for i, tokens in zip(chosen, encoded):
                ids[i] = tokens
    return ids


def choice_log_likelihoods(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    batch_tokens: int = 4096,
    progress: Progress = lambda n: None,
    branches: bool | None = None,
) -> list[ChoiceScores]:
    """log p(choice | prompt) of every choice of every prompt.

    `Σ_t log p(c_t | prompt, c_<t)`, the `loglikelihood` of lm-evaluation-harness: prompt and choice are encoded
    together and split at the length of the encoded prompt; spaces at the end of the prompt count as the start
    of the choice; an empty prompt is the prefix token. A choice must bring its own space in front.

    The first call with a model compares branches with plain rows, one per choice, and remembers plain rows for
    a model where they differ (recurrent layers, positions that cannot be set, flash attention).

    Args:
        prompts: n texts, exactly as the model shall see them.
        choices: n lists of texts.
        batch_tokens: padded tokens per forward pass; on a CPU at most 1024, beyond which it only gets slower.
        progress: called with the number of prompts just finished.
        branches: True or False forces the way and skips the comparison; None decides.

    Returns:
        n scores, in the order of the prompts; float32 log-probabilities, summed in float64.

    Raises:
        DataError: a prompt without choices, or a choice without tokens of its own.
    """
    pairs, owners = _encode_choices(tokenizer, prompts, choices)
    limit = context_length(model, tokenizer) + 1
    truncated = [max(0, len(context) + len(own) - limit) for context, own in pairs]
    cut = [_cut(context, own, limit) for context, own in pairs]
    groups: list[list[int]] = [[] for _ in prompts]
    for choice, item in enumerate(owners):
        groups[item].append(choice)

    with looking(model):
        ability = _Ability(branches, 10**9) if branches is not None else _ability(model, cut, groups)
        rows: list[Row] = []
        for item, group in enumerate(groups):
            row = branching_row(cut, group) if ability.branches else None
            if row is not None and (len(row.tokens) > batch_tokens or max(row.positions) >= ability.reach):
                row = None
            for one in [plain_row(*cut[choice], choice) for choice in group] if row is None else [row]:
                one.items = [item]
                rows.append(one)
        sums = score_rows(model, tokenizer, rows, len(pairs), batch_tokens, progress)

    return [
        ChoiceScores(
            log_likelihoods=[sums[choice] for choice in group],
            tokens=[len(pairs[choice][1]) for choice in group],
            characters=[len(text.lstrip()) for text in choices[item]],
            truncated=max(truncated[choice] for choice in group),
        )
        for item, group in enumerate(groups)
    ]


def text_log_likelihood(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 4096,
    progress: Progress = lambda n: None,
) -> list[TextScore]:
    """Summed log-likelihood of every text, each token predicted exactly once.

    The `loglikelihood_rolling` of lm-evaluation-harness: the first token is predicted from the prefix token;
    a long text is read in windows. Different from there, a BOS that the tokenizer puts in front by itself is
    the prefix and not a token to predict, and with `stride < window` every token after the first window has
    at least `window − stride` tokens before it (better predictions, window/stride times the work).

    Args:
        texts: n texts; an empty one scores 0 with 0 tokens.
        window: tokens per forward pass and text; the model's context by default, and at most that.
        stride: tokens newly predicted per window; by default all of them.

    Raises:
        DataError: `stride` is not between 1 and `window`.
    """
    longest = context_length(model, tokenizer)
    window = min(window or longest, longest)
    stride = stride or window
    if not 1 <= stride <= window:
        raise DataError(f"stride: {stride} given; allowed is 1 to the window ({window} tokens).")
    prefix = prefix_token(tokenizer)
    rows: list[Row] = []
    counts, windows = [], []
    for owner, tokens in enumerate(encode(tokenizer, texts)):
        if tokens and tokens[0] == tokenizer.bos_token_id:
            tokens = tokens[1:]
        whole = [prefix, *tokens]
        done, before = 0, len(rows)
        while done < len(tokens):
            end = min(len(tokens), done + (stride if done else window))
            start = max(0, end - window)
            rows.append(plain_row(whole[start : done + 1], whole[done + 1 : end + 1], owner))
            rows[-1].items = [owner]
            done = end
        if not tokens:
            progress(1)
        counts.append(len(tokens))
        windows.append(len(rows) - before)
    with looking(model):
        sums = score_rows(model, tokenizer, rows, len(texts), batch_tokens, progress)
    return [TextScore(s, n, w) for s, n, w in zip(sums, counts, windows)]


def _encode_choices(
    tokenizer: Any, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """(tokens of the prompt, tokens of the choice) for every choice, and the prompt that each belongs to."""
    owners, before, whole, texts = [], [], [], []
    for item, (prompt, options) in enumerate(zip(prompts, choices, strict=True)):
        if not options:
            raise DataError(f"prompt {item + 1} ('{prompt[-40:]}'): has no choices. Give at least one.")
        head = prompt.rstrip()
        for option in options:
            owners.append(item)
            texts.append(option)
            before.append(head)
            whole.append(prompt + option)
    bare = [i for i, head in enumerate(before) if not head]
    full = [i for i, head in enumerate(before) if head]
    pairs: list[tuple[list[int], list[int]]] = [([], [])] * len(owners)
    unique = list(dict.fromkeys(before[i] for i in full))
    lengths = {head: len(ids) for head, ids in zip(unique, encode(tokenizer, unique))}
    for i, ids in zip(full, encode(tokenizer, [whole[i] for i in full])):
        split = lengths[before[i]]
        pairs[i] = (ids[:split], ids[split:])
    if bare:
        prefix = prefix_token(tokenizer)
        for i, ids in zip(bare, encode(tokenizer, [whole[i] for i in bare], special=False)):
            pairs[i] = ([prefix], ids[1:] if ids and ids[0] == prefix else ids)
    for i, (_, own) in enumerate(pairs):
        if not own:
            raise DataError(
                f"prompt {owners[i] + 1} ('{before[i][-40:]}'): choice '{texts[i]}' has no tokens of its own. "
                "Give a choice that is not empty."
            )
    return pairs, owners


def _cut(context: list[int], own: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Keep the last `limit` tokens of context + own; at least one token stays in front."""
    extra = max(0, len(context) + len(own) - limit)
    if extra < len(context):
        return context[extra:], own
    tokens = (context + own)[extra:]
    return tokens[:1], tokens[1:]


def _ability(
    model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]], groups: Sequence[Sequence[int]]
) -> _Ability:
    """Whether branches may be used with this model; measured once, on the first prompt that has branches."""
    if model in _abilities:
        return _abilities[model]
    config = text_config(model)
    reach = min(
        (value for name in ("sliding_window", "attention_chunk_size") if (value := getattr(config, name, None))),
        default=10**9,
    )
    possible = getattr(config, "_attn_implementation", None) in _BRANCHING_ATTENTION and set(
        getattr(config, "layer_types", None) or _BRANCHING_LAYERS
    ) <= (_BRANCHING_LAYERS)
    if not possible:
        return _abilities.setdefault(model, _Ability(False, 0))
    for group in groups:
        row = branching_row(pairs, group)
        if any(row.segments) and max(row.positions) < reach:
            break
    else:
        return _Ability(True, reach)  # nothing to compare yet: without branches the two ways are one
    plain_rows = [plain_row(*pairs[choice], choice) for choice in group]
    # A pass that fails is an answer too: this model takes no mask or positions of ours.
    try:
        branched = _totals(forward_rows(model, 0, [row]), group)
        plain = _totals([x for one in plain_rows for x in forward_rows(model, 0, [one])], group)
        gaps = [abs(a - b) for a, b in zip(branched, plain)]
        if floating(model) in (torch.float32, torch.float64):
            same = all(gap <= 1e-3 for gap in gaps)
        else:  # rounding alone moves single tokens by a few tenths, a wrong mask moves most of them
            same = sum(gap / len(pairs[choice][1]) for gap, choice in zip(gaps, group)) / len(gaps) <= 0.1
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):
        same = False
    return _abilities.setdefault(model, _Ability(same, reach))


def _totals(values: list[tuple[int, float]], group: Sequence[int]) -> list[float]:
    return [math.fsum(value for owner, value in values if owner == choice) for choice in group]
