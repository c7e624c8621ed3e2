"""Several models that answer as one: their distributions over the next token, averaged by weight.

The weights are fixed, or found for each prompt: by a router's scores, or by any function of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from retain.errors import ConfigError
from retain.functional.ensembles import Average, mixed, shares
from retain.models.decoding import Draw
from retain.models.generation import Generated, Prompt, encode_prompts, stop_tokens
from retain.models.likelihood import context_length, encode
from retain.models.rows import looking
from retain.models.vocabulary import require_same

#: By member; the base of adapters is called None.
Weights = Mapping[str | None, float]
#: A prompt's text → its weights, which need not sum to 1.
Weigher = Callable[[str], Weights]


class Members(Protocol):
    """Models that can be asked for their logits."""

    models: list[Any]

    def require(self, names: Sequence[str | None]) -> None:
        """Refuse a name that is no member's."""

    def __call__(self, names: Sequence[str | None], ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [n, T, V] of n members for tokens [1, T] that follow a cache, and the cache after them."""


class Ensemble:
    """A weighted average of next-token distributions; made by `of_models`, `of_pool` or `of_adapters`.

    Args:
        members: who is asked.
        tokenizer: of all of them.
        weights: by name, or a function that gives them for a prompt; a name without one has weight 0 and is not run.
        average: "probabilities" for log Σ wᵢpᵢ, or "logits" for log softmax Σ wᵢzᵢ.
        top: only the members with the largest weights take part, and theirs are made to sum to 1.
    """

    def __init__(
        self,
        members: Members,
        tokenizer: Any,
        weights: Weights | Weigher,
        average: Average = "probabilities",
        top: int | None = None,
    ) -> None:
        if average not in ("probabilities", "logits"):
            raise ConfigError(f"ensemble: average = '{average}' given; allowed: probabilities, logits.")
        self.members, self.tokenizer, self.average, self.top = members, tokenizer, average, top
        self._weights = weights
        if not callable(weights):
            members.require(list(shares(weights, top)))

    @classmethod
    def of_models(cls, models: Mapping[str, tuple[Any, Any]], weights: Weights | Weigher, **settings: Any) -> Self:
        """Of whole models, each with its tokenizer, run one after the other.

        Raises:
            ModelError: tokenizers that give the same ids to different tokens.
        """
        if not models:
            raise ConfigError("ensemble: no models given. Give one or more.")
        require_same({name: tokenizer for name, (_, tokenizer) in models.items()}, "an average of next tokens")
        first = next(iter(models.values()))[1]
        return cls(_Separate({name: model for name, (model, _) in models.items()}), first, weights, **settings)

    @classmethod
    def of_pool(cls, pool: Any, tokenizer: Any, weights: Weights | Weigher, **settings: Any) -> Self:
        """Of experts in an `AdapterPool`, and its base under the name None; one batch with a row for each."""
        return cls(_Pooled(pool), tokenizer, weights, **settings)

    @classmethod
    def of_adapters(cls, model: Any, tokenizer: Any, weights: Weights | Weigher, **settings: Any) -> Self:
        """Of the adapters of a `PeftModel`, and its base under the name None; one batch with a row for each."""
        return cls(_Adapters(model), tokenizer, weights, **settings)

    def weights(self, prompt: Prompt) -> dict[str | None, float]:
        """Who takes part in answering a prompt, the largest weight first; they sum to 1.

        Raises:
            ConfigError: weights that are negative or all zero, or a name that is no member's.
        """
        found = shares(self._weights(_question(prompt)) if callable(self._weights) else self._weights, self.top)
        self.members.require(list(found))
        return found

    def next_log_probs(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [V] of the token after a prompt."""
        with self._looking():
            return self._step(self.weights(prompt), self._ids(prompt), None)[0][-1]

    def log_probs(self, prompt: Prompt, answer: str) -> Tensor:
        """Log-probabilities [T] of the tokens of an answer, each given what comes before it.

        Raises:
            ConfigError: an answer without tokens, or more than fits.
        """
        ids, own = self._ids(prompt), encode(self.tokenizer, [answer], special=False)[0]
        if not own or len(ids) + len(own) > self._room():
            raise ConfigError(
                f"ensemble: {len(ids)} tokens of prompt and {len(own)} of answer; allowed: an answer of one or more, "
                f"and {self._room()} together."
            )
        with self._looking():
            said, _ = self._step(self.weights(prompt), (ids + own)[:-1], None)
        return said[len(ids) - 1 :].gather(1, torch.tensor(own, device=said.device)[:, None])[:, 0]

    def generate(
        self, prompt: Prompt, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Generated:
        """An answer, every token of it chosen by the average; with the key-value cache.

        Args:
            prompt: as `retain.models.generation.generate` takes it; what does not fit is cut from its left.
            temperature: 0 is greedy. It divides the logarithm of the average, not the members' logits.
            top_p: draw from the smallest set of tokens with this probability; only with a temperature.

        Raises:
            ConfigError: a limit below 1, or one that fills the whole context.
        """
        room = self._room()
        if not 1 <= max_new_tokens < room:
            raise ConfigError(f"max_new_tokens: {max_new_tokens} given; allowed is 1 to {room - 1} for these models.")
        ids = self._ids(prompt)
        cut = max(0, len(ids) + max_new_tokens - room)
        stops = {stop for model in self.members.models for stop in stop_tokens(model, self.tokenizer)}
        draw = Draw(temperature, top_p, seed, 1) if temperature > 0 else None
        written: list[int] = []
        weights, new, cache = self.weights(prompt), ids[cut:], None
        with self._looking():
            while len(written) < max_new_tokens and not (written and written[-1] in stops):
                said, cache = self._step(weights, new, cache)
                scores = said[-1:] if draw is None else draw(torch.empty(0), said[-1:])
                new = [int(scores[0].argmax())]
                written += new
        finished = written[-1] in stops
        text = self.tokenizer.decode(written[: len(written) - finished], skip_special_tokens=True)
        return Generated(text.strip(), len(written), finished, cut, written)

    def _step(self, weights: Mapping[str | None, float], ids: list[int], cache: Any) -> tuple[Tensor, Any]:
        logits, cache = self.members(list(weights), torch.tensor([ids]), cache)
        return mixed(logits, list(weights.values()), self.average), cache

    def _ids(self, prompt: Prompt) -> list[int]:
        return encode_prompts(self.tokenizer, [prompt])[0]

    def _room(self) -> int:
        return min(context_length(model, self.tokenizer) for model in self.members.models)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model in self.members.models:
                stack.enter_context(looking(model))
            yield


def by_router(router: Any) -> Weigher:
    """Weights out of a router's scores: the chance that a prompt is an expert's; what is left is the base's."""

    def weights(prompt: str) -> Weights:
        scores: dict[str | None, float] = dict(router.route([prompt])[0].scores)
        return scores | {None: max(0.0, 1.0 - sum(scores.values()))}

    return weights


def _question(prompt: Prompt) -> str:
    """What a router reads: the text, or what the user said last."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")


class _Separate:
    """Whole models; each has a cache of its own."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        self._by_name = dict(models)
        self.models = list(models.values())

    def require(self, names: Sequence[str | None]) -> None:
        _require(names, self._by_name)

    def __call__(self, names: Sequence[str | None], ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        caches, logits = cache or [None] * len(names), []
        for place, name in enumerate(names):
            model = self._by_name[name]  # type: ignore[index]
            out = model(input_ids=ids.to(model.device), past_key_values=caches[place], use_cache=True)
            logits.append(out.logits[0])
            caches[place] = out.past_key_values
        common = min(each.shape[-1] for each in logits)  # heads may be padded beyond the vocabulary, by any number
        return torch.stack([each[:, :common].to(logits[0].device) for each in logits]), caches


class _Adapters:
    """Adapters of one PeftModel: a row for each in one pass over the base."""

    def __init__(self, model: Any) -> None:
        self.models = [model]

    def require(self, names: Sequence[str | None]) -> None:
        _require(names, {**self.models[0].peft_config, None: None})

    def __call__(self, names: Sequence[str | None], ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        rows = ["__base__" if name is None else name for name in names]  # PEFT's word for rows without an adapter
        return self._pass(names, ids, cache, adapter_names=rows)

    def _pass(self, names: Sequence[str | None], ids: Tensor, cache: Any, **more: Any) -> tuple[Tensor, Any]:
        model = self.models[0]
        batch = ids.to(model.device).expand(len(names), -1)
        out = model(input_ids=batch, past_key_values=cache, use_cache=True, **more)
        return out.logits, out.past_key_values


class _Pooled(_Adapters):
    """Experts of a pool, loaded when they are needed."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool.model)
        self._pool = pool

    def require(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is not None:
                self._pool.library.path(name)

    def __call__(self, names: Sequence[str | None], ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        with self._pool.rows(names):
            return self._pass(names, ids, cache)


def _require(names: Sequence[str | None], known: Mapping[Any, Any]) -> None:
    for name in names:
        if name not in known:
            there = ", ".join("None (the base)" if each is None else each for each in known)
            raise ConfigError(f"ensemble: no member '{name}'. Members: {there}.")
