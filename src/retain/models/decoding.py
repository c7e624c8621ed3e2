"""Rows written with the host's `generate`: what they all begin with is read once, and a row that has ended leaves."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from retain.functional.tiled_head import invert
from retain.models.params import causal


class Opening:
    """What all prompts begin with, such as a template's system message, read once for all of them.

    Not used (`length` 0) where it is short, or where a gap between it and the rest of a padded row would be seen:
    positions that are not told to the model, a window that counts padding, a learned prompt, a cache that cannot be
    repeated.

    Args:
        ids: the tokens of every prompt.
    """

    LEAST = 8  # tokens; fewer are not worth the pass

    def __init__(self, model: Any, ids: Sequence[list[int]]) -> None:
        self.length, self._cache = 0, None
        inner = causal(model)
        config = inner.config.get_text_config()
        told = "position_ids" in inspect.signature(inner.forward).parameters
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        if len(ids) < 2 or not told or window or _learned_prompt(model):
            return
        first, last = min(ids), max(ids)  # what these two share, all share
        shared = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
        shared = min(shared, len(first) - 1, len(last) - 1)  # a row keeps a token of its own
        if shared < self.LEAST:
            return
        device = inner.get_input_embeddings().weight.device
        with torch.no_grad():
            read = model(input_ids=torch.tensor([first[:shared]], device=device), use_cache=True)
        if hasattr(getattr(read, "past_key_values", None), "batch_repeat_interleave"):
            self.length, self._cache = shared, read.past_key_values

    def cache(self, rows: int) -> Any:
        """Keys and values of the opening for a batch; None without an opening."""
        if self._cache is None:
            return None
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


def rows_as_they_end(
    model: Any,
    ids: list[list[int]],
    limits: torch.Tensor,
    stops: list[int],
    pad: int,
    draw: Draw | None,
    opening: Opening,
) -> Iterator[tuple[int, list[int]]]:
    """(place in the batch, new tokens) of every row, as they end.

    The host computes a row that has ended until the last one has. It is therefore called anew, with the cache of the
    others, whenever a good part of the rows has ended.

    Args:
        ids: the tokens of n prompts.
        limits: [n] new tokens, on the model's device.
        stops: ids that end a row.
        draw: for sampling; None is greedy.
        opening: of these prompts.
    """
    width, device, start = max(map(len, ids)), limits.device, opening.length
    gaps = [width - len(row) for row in ids]
    padded = [row[:start] + [pad] * gap + row[start:] for row, gap in zip(ids, gaps)]
    seen = [[1] * start + [0] * gap + [1] * (width - start - gap) for gap in gaps]
    tokens, mask = torch.tensor(padded, device=device), torch.tensor(seen, device=device)
    places, leave = torch.arange(len(ids), device=device), not _learned_prompt(model)
    cache: Any = opening.cache(len(ids))
    while len(places):
        ended = _Ended(width, limits[places], stops, leave)
        if draw is not None:
            draw.places = places.cpu()
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=int(limits[places].max()) - (tokens.shape[1] - width),
                eos_token_id=stops or None,
                pad_token_id=pad,
                use_cache=True,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                do_sample=False,
                top_p=1.0,
                top_k=50,
                return_dict_in_generate=True,
            ),
            logits_processor=LogitsProcessorList([] if draw is None else [draw]),
            stopping_criteria=StoppingCriteriaList([ended]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        for i in ended.done.nonzero()[:, 0].tolist():
            yield int(places[i]), out.sequences[i, width:].tolist()[: int(limits[places[i]])]
        on = (~ended.done).nonzero()[:, 0]
        mask = torch.cat([mask, mask.new_ones(len(mask), out.sequences.shape[1] - mask.shape[1])], dim=1)[on]
        tokens, places, cache = out.sequences[on], places[on], getattr(out, "past_key_values", None)
        leave = hasattr(cache, "batch_select_indices")
        if leave and len(on):
            cache.batch_select_indices(on)
        else:
            cache = None  # this kind cannot lose rows: the others begin once more, with what they wrote


def _learned_prompt(model: Any) -> bool:
    """Whether an adapter puts vectors before a row whenever it begins."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


class Draw(LogitsProcessor):
    """Draws each row's next token and leaves only it to a greedy search.

    The host's own sampling sorts the whole vocabulary and walks over it once more, which takes a small model on a
    CPU longer than the forward pass; the most likely `LIKELY` tokens nearly always hold the nucleus.
    """

    LIKELY = 512

    def __init__(self, temperature: float, top_p: float, seed: int, size: int):
        self.temperature, self.top_p, self.size = temperature, top_p, size
        self.random = torch.Generator().manual_seed(seed)
        self.places = torch.arange(size)  # of the rows that are left: each keeps its own draws

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(self.size, generator=self.random, dtype=torch.float64)[self.places].to(scores.device)
        chosen = draw(scores.float() / self.temperature, uniform, torch.full_like(uniform, self.top_p), self.LIKELY)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw(scores: torch.Tensor, uniform: torch.Tensor, top_p: torch.Tensor, likely: int = Draw.LIKELY) -> torch.Tensor:
    """A token for every row, [n]; what a row draws does not depend on the others.

    Args:
        scores: [n, V] float32, divided by the temperature.
        uniform: [n] in [0, 1).
        top_p: [n]; less than 1 draws from the smallest set of tokens with this probability.
        likely: tokens among which that set is looked for first.
    """
    chosen = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    whole, cut = (top_p >= 1).nonzero()[:, 0], (top_p < 1).nonzero()[:, 0]
    if len(whole):
        chosen[whole] = invert(scores[whole], uniform[whole])
    if len(cut):
        log_p, share = torch.log_softmax(scores[cut], dim=-1), top_p[cut].to(scores.dtype)
        best, ids = log_p.topk(min(likely, log_p.shape[-1]))
        found = _in_nucleus(best, ids, uniform[cut], share)
        flat = best.exp().sum(-1) < share
        if bool(flat.any()):
            found[flat] = _in_nucleus(*log_p[flat].sort(-1, descending=True), uniform[cut][flat], share[flat])
        chosen[cut] = found
    return chosen


def _in_nucleus(log_p: torch.Tensor, ids: torch.Tensor, uniform: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """One of `ids` [n, K], the most likely ones first, drawn among those before which less than top_p [n] lies."""
    p = log_p.exp()
    outside = p.cumsum(-1) - p >= top_p[:, None]
    return ids.gather(1, invert(log_p.masked_fill(outside, -torch.inf), uniform)[:, None])[:, 0]


class _Ended(StoppingCriteria):
    """Which rows have ended: by a stop token, or at their own limit. With `leave`, a good part of them ends all."""

    SHARE = 0.25  # of the rows; each time costs a few milliseconds and a copy of the cache

    def __init__(self, width: int, limits: torch.Tensor, stops: list[int], leave: bool):
        self.width, self.limits, self.leave = width, limits, leave
        self.stops = torch.tensor(stops, dtype=torch.long, device=limits.device)
        self.done = torch.zeros(len(limits), dtype=torch.bool, device=limits.device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.done |= torch.isin(input_ids[:, -1], self.stops) | (self.limits <= input_ids.shape[1] - self.width)
        enough = self.leave and int(self.done.sum()) >= self.SHARE * len(self.done)
        return torch.ones_like(self.done) if enough else self.done
