"""What the base model says at fixed contexts, kept so that any later model can be compared with it.

At every predicted position the k likeliest tokens are kept with their log-probabilities in float32, out of the whole
vocabulary: 8k bytes a position (1 KiB for k = 128), against 200 KiB and more for all logits of a usual vocabulary. What
is not kept is one bucket, the tail. The divergence from such a record is a lower bound of the full one, by

    KL(p⁰‖p) − KL over k tokens and tail = p⁰(tail) · KL(p⁰(· | tail) ‖ p(· | tail)) ≥ 0          (chain rule of KL)

and exact for k = V. The base itself has 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retain.errors import RunError
from retain.functional import divergence
from retain.models.rows import looking, plain_row, row_logits


@dataclass(frozen=True)
class Context:
    """Tokens of which those from index `first` (1 or more) are predicted: N = len(tokens) − first positions."""

    tokens: list[int]
    first: int


@dataclass(frozen=True)
class Said:
    """What the base says in a context: likeliest tokens, ids [N, k] int32 and log-probabilities [N, k] float32."""

    context: Context
    ids: torch.Tensor
    log_probs: torch.Tensor

    @property
    def tail(self) -> float:
        """Mean probability outside the list."""
        return float(divergence.log_tail(self.log_probs).exp().mean())


@dataclass(frozen=True)
class Gap:
    """How far a model is from the base in a context.

    Args:
        nats: KL(p⁰‖p) summed over the positions; a lower bound unless `exact`.
        largest: of one position.
        same: share of positions where both find the same token the likeliest.
        exact: whether the record holds the whole vocabulary.
    """

    nats: float
    largest: float
    same: float
    exact: bool


def say(
    model: torch.nn.Module, tokenizer: Any, contexts: Sequence[Context], k: int, batch_tokens: int = 4096
) -> list[Said]:
    """What a model says in each context; k is held to the size of the vocabulary."""
    found: dict[int, Said] = {}
    for i, logits in _outputs(model, tokenizer, contexts, batch_tokens):
        ids, log_probs = divergence.top_k(logits, min(k, logits.shape[-1]))
        found[i] = Said(contexts[i], ids.int().cpu(), log_probs.float().cpu())
    return [found[i] for i in range(len(contexts))]


def compare(
    model: torch.nn.Module, tokenizer: Any, said: Sequence[Said], batch_tokens: int = 4096
) -> Iterator[tuple[int, Gap]]:
    """(place in `said`, divergence of the model from it), as the passes end."""
    for i, logits in _outputs(model, tokenizer, [one.context for one in said], batch_tokens):
        ids = said[i].ids.to(logits.device).long()
        nats = divergence.top_k_kl(ids, said[i].log_probs.to(logits.device), logits).double().clamp(min=0)
        log_p = divergence.top_k(logits, 1)[1]  # by its value: of tokens that tie, either is the likeliest
        same = (torch.log_softmax(logits.to(log_p.dtype), -1).gather(1, ids[:, :1]) >= log_p).double().mean()
        yield i, Gap(float(nats.sum()), float(nats.max()), float(same), ids.shape[1] == logits.shape[-1])


def save(said: Mapping[str, Said], path: Path) -> None:
    """Write records by name, whole or not at all; those of one file have the same k."""
    everything = list(said.values())
    tensors = {
        "tokens": torch.tensor([token for one in everything for token in one.context.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(one.context.tokens) for one in everything], dtype=torch.int32),
        "firsts": torch.tensor([one.context.first for one in everything], dtype=torch.int32),
        "ids": torch.cat([one.ids for one in everything]),
        "log_probs": torch.cat([one.log_probs for one in everything]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial, metadata={"names": json.dumps(list(said))})  # one key: of several the order is chance
    partial.replace(path)


def load(path: Path) -> dict[str, Said]:
    """The records of a file by name.

    Raises:
        RunError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = json.loads(file.metadata()["names"])
        lengths, firsts = tensors["lengths"].tolist(), tensors["firsts"].tolist()
        rows = tensors["tokens"].split(lengths)
        outputs = [tensors[key].split([n - f for n, f in zip(lengths, firsts)]) for key in ("ids", "log_probs")]
        return {
            names[i]: Said(Context(rows[i].tolist(), first), outputs[0][i], outputs[1][i])
            for i, first in enumerate(firsts)
        }
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{path}: damaged ({first}). Delete it: the base is then asked again.") from error


def _outputs(
    model: torch.nn.Module, tokenizer: Any, contexts: Sequence[Context], batch_tokens: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(place, logits [N, V]) of every context; the same contexts make the same batches, whatever the model."""
    rows = [plain_row(c.tokens[: c.first], c.tokens[c.first :], i) for i, c in enumerate(contexts)]
    with looking(model):
        for row, logits in row_logits(model, tokenizer, rows, batch_tokens):
            yield row.targets[0].owner, logits
