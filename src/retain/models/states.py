"""What the base model makes of a question: the mean of its hidden states over the tokens, after some of its layers.

The lower layers are enough to tell domains apart (docs/routing.md), so the pass ends there and costs that share of a
whole one. Adapters are off: experts must be chosen by what they have in common.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retain.models import params
from retain.models.likelihood import context_length, encode, prefix_token
from retain.models.rows import looking

#: Of a longer question the beginning and the end are read, as many tokens each.
TOKENS = 512
#: Padded tokens per pass.
BATCH_TOKENS = 1024


class _Reached(Exception):
    """The layer that was wanted has answered; the rest of the pass is not needed."""


class StateReader:
    """Questions as vectors [n, H], by one model.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        depth: share of the layers that are run, above 0 to 1.
        lock: held while the model runs, if others use it too.
    """

    def __init__(
        self, model: Any, tokenizer: Any, depth: float, lock: AbstractContextManager[Any] | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = lock if lock is not None else nullcontext()
        layers = params.decoder_layers(model)
        self.layers = max(1, math.ceil(depth * len(layers)))
        self._last = layers[self.layers - 1]
        self._prefix = prefix_token(tokenizer)
        self._most = min(TOKENS, context_length(model, tokenizer))

    def __call__(self, texts: Sequence[str], progress: Callable[[int], None] = lambda n: None) -> NDArray[np.float32]:
        """Mean hidden states [n, H] of texts; a text without tokens is the prefix token alone."""
        rows = [self._cut(tokens) for tokens in encode(self.tokenizer, texts)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, NDArray[np.float32]] = {}
        while order:
            count = max(1, BATCH_TOKENS // len(rows[order[0]]))
            batch, order = order[:count], order[count:]
            found |= dict(zip(batch, self._means([rows[i] for i in batch])))
            progress(len(batch))
        return np.stack([found[i] for i in range(len(rows))])

    def _cut(self, tokens: list[int]) -> list[int]:
        half = self._most // 2
        return (tokens if len(tokens) <= self._most else tokens[:half] + tokens[-half:]) or [self._prefix]

    def _means(self, rows: list[list[int]]) -> NDArray[np.float32]:
        device = params.causal(self.model).get_input_embeddings().weight.device
        length = max(map(len, rows))
        ids = torch.tensor([row + [self._prefix] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        with self.lock, looking(self.model), params.adapters_off(self.model):
            states = self._states(ids, mask).float()
        kept = mask[..., None]
        return ((states * kept).sum(1) / kept.sum(1)).cpu().numpy()

    def _states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] behind the last wanted layer."""
        reached: list[torch.Tensor] = []
        running = threading.get_ident()

        def stop(module: Any, args: Any, output: Any) -> None:
            if threading.get_ident() != running:  # somebody else's pass
                return
            reached.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        handle = self._last.register_forward_hook(stop)
        try:
            params.causal(self.model).base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]
