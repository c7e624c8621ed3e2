"""The rows that are being written: their keys and values in one cache, into which rows come and out of which they go.

Rows stand with their ends aligned: row i begins at slot `starts[i]`, and what lies before it is never looked at.

`transformers` has a scheduler for this (`continuous_batching`), which cannot be used: it lays the tokens of all
requests behind one another in a single row, [1, N], so that nothing of PEFT can tell whose tokens they are, and it
hands the model nothing through which one could say so.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from retain.errors import ModelError
from retain.models.params import causal

#: Slots kept free behind the last token, so that a step does not copy the whole cache.
ROOM = 64


class Growing(DynamicLayer):
    """Keys and values of one layer [n, heads, slots, size] that grow in place while there is room."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new slots behind the others; all that are filled are returned."""
        filled = self.get_seq_length()
        end = filled + key_states.shape[-2]
        if not self.is_initialized or end > self._keys.shape[-2]:
            stores = [_storage(new, len(new), end) for new in (key_states, value_states)]
            if filled:
                assert self.keys is not None
                assert self.values is not None
                stores[0][..., :filled, :], stores[1][..., :filled, :] = self.keys, self.values
            self.hold(stores[0], stores[1], filled)
        self._keys[..., filled:end, :], self._values[..., filled:end, :] = key_states, value_states
        return self.hold(self._keys, self._values, end)

    def hold(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take over storage of which the first `filled` slots count, and return those."""
        self._keys, self._values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[..., :filled, :], values[..., :filled, :]
        return self.keys, self.values


def _storage(like: torch.Tensor, rows: int, end: int) -> torch.Tensor:
    """Zeros, as what is masked is still multiplied, [rows, heads, end + room, size]."""
    return like.new_zeros(rows, like.shape[1], end + ROOM, like.shape[3])


def check_model(model: Any) -> None:
    """Raises ModelError where a row cannot leave or join: what a layer keeps is not one state per token."""
    kept = DynamicCache(config=causal(model).config.get_text_config()).layers
    other = next((type(k).__name__ for k in kept if type(k) not in (DynamicLayer, DynamicSlidingWindowLayer)), None)
    if other:
        raise ModelError(
            f"model: {type(causal(model)).__name__} keeps a {other}, and rows that come and go need keys and values of "
            "every token. Serve it with vLLM and put the router in front: `retain serve --upstream URL`."
        )


class Batch:
    """Keys and values of n rows, `width` slots each.

    Args:
        model: that writes them; called on `pool.model`, so that the experts of the rows act.
    """

    def __init__(self, model: Any) -> None:
        accepts = inspect.signature(causal(model).forward).parameters
        self.model, self.width = model, 0
        self.starts: list[int] = []
        self._cache = Cache(layer_class_to_replicate=Growing)
        self._tells_places = "position_ids" in accepts
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        self._device = causal(model).get_input_embeddings().weight.device

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def _filled(self) -> list[Growing]:
        """The layers that hold something; those that use another one's keys and values do not."""
        return [layer for layer in self._cache.layers if isinstance(layer, Growing) and layer.is_initialized]

    def read(self, prompts: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        """Begin with prompts; the scores of what follows each, [n, V]."""
        self.width = max(map(len, prompts))
        self.starts = [self.width - len(prompt) for prompt in prompts]
        tokens = [[pad] * start + list(prompt) for start, prompt in zip(self.starts, prompts)]
        return self._forward(torch.tensor(tokens, device=self._device))

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """One more token in every row; the scores of what follows, [n, V]."""
        self.width += 1
        return self._forward(torch.tensor(tokens, device=self._device)[:, None])

    def join(self, other: Batch) -> None:
        """Rows of another batch come behind these; it is used up."""
        if not len(other):
            return
        if not len(self):
            self.width, self.starts, self._cache = other.width, other.starts, other._cache
            return
        width = max(self.width, other.width)
        both = [(self, 0), (other, len(self))]
        for mine, theirs in zip(self._filled, other._filled, strict=True):
            stores = []
            for kind in ("keys", "values"):
                store = _storage(getattr(mine, kind), len(self) + len(other), width)
                for (batch, first), layer in zip(both, (mine, theirs)):
                    store[first : first + len(batch), :, width - batch.width : width] = getattr(layer, kind)
                stores.append(store)
            mine.hold(stores[0], stores[1], width)
        self.starts = [start + width - batch.width for batch, _ in both for start in batch.starts]
        self.width = width

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order; slots that none of them needs go too."""
        if len(rows) == len(self):
            return
        starts = [self.starts[row] for row in rows]
        front = min(starts, default=0)
        if not starts:
            self._cache = Cache(layer_class_to_replicate=Growing)
        chosen = torch.tensor(rows, device=self._device)
        for layer in self._filled:
            stores = []
            for kind in ("keys", "values"):
                old = getattr(layer, kind)
                store = _storage(old, len(rows), self.width - front)
                store[..., : self.width - front, :] = old[chosen, :, front:]
                stores.append(store)
            layer.hold(stores[0], stores[1], self.width - front)
        self.starts, self.width = [start - front for start in starts], self.width - front if starts else 0

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor(self.starts, device=self._device)[:, None]
        inputs: dict[str, Any] = {}
        if any(self.starts):
            inputs["attention_mask"] = (torch.arange(self.width, device=self._device) >= starts).long()
        if self._tells_places:
            places = torch.arange(self.width - tokens.shape[1], self.width, device=self._device)
            inputs["position_ids"] = (places - starts).clamp_(min=0)
        out = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **inputs, **self._last_only)
        return out.logits[:, -1]
