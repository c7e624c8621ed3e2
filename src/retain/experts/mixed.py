"""A batch whose rows have experts of their own, in the time of a batch with one.

The factors of all experts in the batch are joined: A [R, in] and B [out, R] with R the sum of their ranks. One product
with each serves all rows, and between them what belongs to other rows' experts is set to zero:

    y = W x + B (m ∘ A x),   m[row, j] = 1 where rank j is of the row's expert

which are as many operations as for one expert, where going from expert to expert takes several for each. With many
tokens and many ranks the products themselves become dear, and then experts are served one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from retain.errors import ModelError

_FEW_TOKENS = 256  # up to so many in a batch, joined products cost less than the operations that they save
_NARROW = 8  # and with more tokens, while all ranks together are at most the layer's input over this


class Joined:
    """The factors of some experts side by side, per layer, made when first needed.

    Args:
        keys: PEFT's names of the experts.
    """

    def __init__(self, keys: frozenset[str]) -> None:
        self.keys = keys
        self._factors: dict[int, tuple[torch.Tensor, torch.Tensor, tuple[tuple[str, int], ...]]] = {}

    def of(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor, tuple[tuple[str, int], ...]]:
        """(A [R, in], B [out, R] with the scales in it, (expert, rank) in their order) of a layer; R may be 0."""
        found = self._factors.get(id(layer))
        if found is None:
            here = [key for key in sorted(self.keys) if key in layer.lora_A]
            a = [layer.lora_A[key].weight for key in here]
            b = [layer.lora_B[key].weight * layer.scaling[key] for key in here]
            ranks = tuple((key, len(one)) for key, one in zip(here, a))
            empty = torch.empty(0, 0)
            found = (torch.cat(a), torch.cat(b, 1), ranks) if here else (empty, empty, ranks)
            self._factors[id(layer)] = found
        return found


class Rows:
    """Which expert each row of a batch has.

    Args:
        keys: PEFT's name per row, None for the base.
        joined: of exactly these experts.
    """

    def __init__(self, keys: Sequence[str | None], joined: Joined) -> None:
        self.keys, self.joined = list(keys), joined
        self._others: dict[Any, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, layer: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What a layer of the base said, with each row's expert added.

        Args:
            layer: a LoRA layer over a linear one.
            x: its input [rows, …, in].
            output: of the base [rows, …, out].

        Raises:
            ModelError: other rows than were announced.
        """
        if len(x) != len(self.keys):
            raise ModelError(
                f"rows: {len(self.keys)} experts given for a batch of {len(x)}. Give one per row; beams and several "
                "answers per prompt count as rows."
            )
        a, b, ranks = self.joined.of(layer)
        if not ranks:
            return output
        if x[..., 0].numel() > _FEW_TOKENS and len(a) * _NARROW > x.shape[-1]:
            return self._one_by_one(layer, x, output, ranks)
        hidden = linear(x.to(a.dtype), a)
        hidden.masked_fill_(self._of_others(ranks, hidden), 0)
        return output + linear(hidden, b).to(output.dtype)

    def _one_by_one(self, layer: Any, x: torch.Tensor, output: torch.Tensor, ranks: Any) -> torch.Tensor:
        output = output.clone()
        for key, _ in ranks:
            mine = torch.tensor([i for i, own in enumerate(self.keys) if own == key], device=x.device)
            a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
            change = linear(linear(x[mine].to(a.dtype), a), b) * layer.scaling[key]
            output.index_add_(0, mine, change.to(output.dtype))
        return output

    def _of_others(self, ranks: tuple[tuple[str, int], ...], hidden: torch.Tensor) -> torch.Tensor:
        """True where a rank is not of the row's expert [rows, 1 …, R]."""
        known = (ranks, hidden.dim())
        if known not in self._others:
            table = [[own != key for key, rank in ranks for _ in range(rank)] for own in self.keys]
            mask = torch.tensor(table, device=hidden.device)
            self._others[known] = mask.view(len(self.keys), *[1] * (hidden.dim() - 2), -1)
        return self._others[known]
