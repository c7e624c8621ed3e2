"""Answers written by a model: prompts rendered, batched, padded on the left, returned in the order asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from retain.errors import ConfigError
from retain.models.decoding import Draw, Opening, rows_as_they_end
from retain.models.likelihood import context_length, encode
from retain.models.params import causal
from retain.models.rows import looking

Message = dict[str, str]  # {"role": "user", "content": "…"}
Prompt = str | list[Message]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Generated:
    """One answer.

    Args:
        text: the answer without the stop token and other special tokens.
        tokens: number of tokens written, the stop token included.
        finished: True when the model stopped by itself, False when it ran into `max_new_tokens`.
        truncated: tokens cut from the left of the prompt because it did not fit the context.
        ids: the tokens written, the stop token included; empty where a server wrote.
    """

    text: str
    tokens: int
    finished: bool
    truncated: int = 0
    ids: list[int] = field(default_factory=list, compare=False, repr=False)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how to write a chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Prompt, chat: bool = True) -> str:
    """The exact text that the model is given.

    With a chat template and `chat=True`: the rendered messages and the header of the answer, thinking switched
    off where the template has that switch. Otherwise the contents, each followed by a newline. A plain string
    is one message of the user.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if chat and has_chat_template(tokenizer):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    return "".join(message["content"].rstrip("\n") + "\n" for message in messages)


def stop_tokens(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Ids that end an answer: of the generation config, the tokenizer's EOS, and the end of a chat turn.

    The last is found by rendering an answered question and taking the special token behind the answer: many
    chat models keep another EOS in their configuration than the one that they were trained to end with.
    """
    given = getattr(getattr(causal(model), "generation_config", None), "eos_token_id", None)
    stops = set(given if isinstance(given, list) else [given]) | {tokenizer.eos_token_id}
    if has_chat_template(tokenizer):
        answer = "0x2a"
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        tail = tokenizer.apply_chat_template(turn, tokenize=False).rpartition(answer)[2]
        ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        if ids and ids[0] in special:
            stops.add(ids[0])
    return sorted(stop for stop in stops if stop is not None)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: Progress = lambda n: None,
) -> list[Generated]:
    """Let the model answer every prompt, with the key-value cache. Rows that have ended leave their batch.

    Greedy answers depend on the model and the prompt alone, up to rounding between batch shapes. Sampled
    answers depend also on `seed`, on the whole list of prompts and on `batch_tokens` (each batch is seeded by
    `seed` and its number); the random state of the caller is not used. Repetition penalties and other
    habits of the model's generation config are not applied: every model is asked the same way.

    Args:
        prompts: n prompts; messages are rendered with the chat template, a string is taken as it is.
        max_new_tokens: one limit, or n limits; prompts of like limit and length share a batch.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with this probability; only with a temperature.
        batch_tokens: padded tokens, prompt and answer, that a batch may hold.
        progress: called with the number of prompts just finished.

    Returns:
        n answers, in the order of the prompts.

    Raises:
        ConfigError: a limit below 1, or one that fills the whole context.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    room = context_length(model, tokenizer)
    for limit in limits:
        if not 1 <= limit < room:
            raise ConfigError(f"max_new_tokens: {limit} given; allowed is 1 to {room - 1} for this model.")
    ids = encode_prompts(tokenizer, prompts)
    cut = [max(0, len(tokens) + limit - room) for tokens, limit in zip(ids, limits, strict=True)]
    ids = [tokens[extra:] for tokens, extra in zip(ids, cut)]
    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops[0] if stops else 0)
    answers: list[Generated | None] = [None] * len(prompts)

    device = causal(model).get_input_embeddings().weight.device
    with looking(model):
        opening = Opening(model, ids)
        for number, batch in enumerate(_batches(ids, limits, batch_tokens)):
            draw = Draw(temperature, top_p, seed * 1_000_003 + number, len(batch)) if temperature > 0 else None
            own = torch.tensor([limits[i] for i in batch], device=device)
            for place, row in rows_as_they_end(model, [ids[i] for i in batch], own, stops, pad, draw, opening):
                answers[batch[place]] = _read(tokenizer, row, set(stops), cut[batch[place]])
                progress(1)
    return [answer for answer in answers if answer is not None]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids; a rendered chat brings its own special tokens, other text gets the tokenizer's."""
    rendered = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    chat = has_chat_template(tokenizer)
    texts = [prompt if isinstance(prompt, str) else render(tokenizer, prompt) for prompt in prompts]
    ids = encode(tokenizer, texts)
    if chat and rendered:
        for i, tokens in zip(rendered, encode(tokenizer, [texts[i] for i in rendered], special=False)):
            ids[i] = tokens
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else (tokenizer.eos_token_id or 0)
    return [tokens or [start] for tokens in ids]


def _batches(ids: list[list[int]], limits: list[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: (-limits[i], -len(ids[i]))):
        width = max((len(ids[j]) for j in [*batch, i]), default=0)
        if batch and (len(batch) + 1) * (width + limits[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _read(tokenizer: Any, row: list[int], stops: set[int], truncated: int) -> Generated:
    """Cut a row at its first stop token; what follows is padding."""
    end = next((place for place, token in enumerate(row) if token in stops), None)
    text = tokenizer.decode(row[:end], skip_special_tokens=True)
    ids = row if end is None else row[: end + 1]
    return Generated(text.strip(), len(ids), end is not None, truncated, ids)
