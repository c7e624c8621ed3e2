"""A model in memory as lm-evaluation-harness asks it. Only for those who have the `harness` extra installed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from retain.models.params import causal
from retain.models.rows import CPU_TOKENS, LOGIT_NUMBERS, Progress, text_config


class LiveLM(HFLM):
    """The harness's own model class around a model that is there already: adapters, quantised or unsaved weights.

    Prompts, tokens, windows and stops are the harness's. Batches hold as many tokens as those of other probes, the
    arithmetic is that of the autocast around the call, and log-probabilities are taken in float32 whatever the
    weights are in: in bfloat16 a sum over an answer is off by whole nats.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer; a copy is used, as the harness sets what is padded and where.
        batch_tokens: padded tokens of a forward pass.
        items: number of items that the requests to come belong to.
        progress: called with the number of items just finished.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, items: int, progress: Progress) -> None:
        device = causal(model).get_input_embeddings().weight.device
        half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        super().__init__(
            pretrained=_AsItIs(model, device),
            tokenizer=copy.deepcopy(tokenizer),
            mixed_precision_dtype=half,
            softmax_dtype="float32",
        )
        vocabulary = getattr(text_config(model), "vocab_size", None) or len(tokenizer)
        self._room = min(CPU_TOKENS if device.type == "cpu" else batch_tokens, LOGIT_NUMBERS // vocabulary)
        self.cache_hook = self._finished = _Finished(items, progress)
        self._ends: list[int] = []  # of each text, in windows

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of whole texts in nats, as the harness's."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self._hold(min(max(lengths), self.max_length))
        self._ends = list(accumulate(math.ceil(length / self.max_length) for length in lengths))
        self._finished.begin(self._ends[-1])
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Written answers, as the harness's."""
        limits = [normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests]
        self._hold(max(len(self.tok_encode(r.args[0])) + limit for r, limit in zip(requests, limits)))
        self._finished.begin(len(requests))
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        rolling = requests[0][0] is None  # a batch of windows
        if not rolling:
            self._hold(max(len(context) + len(answer) - 1 for _, context, answer in requests))  # the last is not read
            self._finished.begin(len(requests))
        found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if rolling:
            self._finished.add(len(requests))
        return found

    def _hold(self, longest: int) -> None:
        """Rows of a batch, so that the longest fit; the harness wants one number for all of them."""
        self.batch_size_per_gpu = max(1, self._room // max(1, longest))


class _AsItIs:
    """A model that the harness does not take for a module: it would tie weights anew that adapters have set apart."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device, self.config = model, device, causal(model).config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, ids: torch.Tensor) -> Any:
        return self.model(input_ids=ids)


class _Finished:
    """Counts items by the requests, or windows, that are through; in the place of the harness's cache of answers."""

    def __init__(self, items: int, progress: Progress) -> None:
        self.items, self.progress = items, progress
        self.told = self.parts = self.done = 0

    def begin(self, parts: int) -> None:
        self.parts, self.done = parts, 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """The harness calls it with every answer."""
        if kind != "loglikelihood_rolling":  # whose windows were counted as they came
            self.add(1)

    def add(self, parts: int) -> None:
        self.done += parts
        self.tell(self.items * self.done // max(1, self.parts))

    def tell(self, items: int) -> None:
        """Report that so many items are finished in all."""
        items = min(items, self.items)
        if items > self.told:
            self.progress(items - self.told)
            self.told = items
