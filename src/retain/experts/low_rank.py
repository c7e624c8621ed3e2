"""Low-rank changes of several experts in one batch, each row with its own: two matrix products, however many experts.

PEFT's mixed batches go through the experts of every layer one after the other, and pick out and put back the rows of
each. In a small model that costs more than the low-rank products themselves (docs/experts.md has the times). Here the
A of all experts in the batch are stacked, [R, in] with R the sum of their ranks, and the B beside one another,
[out, R]; of x Aᵀ [n, T, R] a row keeps the columns of its own expert and nothing of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear


class Stacked:
    """The changes that some experts make to one layer, for the rows of a batch.

    Args:
        layer: a LoRA layer of PEFT.
        keys: PEFT's names of the experts in the batch, each once; those that do not change the layer are passed over.
    """

    def __init__(self, layer: Any, keys: Sequence[str]) -> None:
        here = [key for key in keys if key in layer.lora_A]
        self.ranks = tuple((key, layer.lora_A[key].weight.shape[0]) for key in here)
        if len(here) == 1:  # no copy
            self.A, self.B = layer.lora_A[here[0]].weight, layer.lora_B[here[0]].weight
        elif here:
            self.A = torch.cat([layer.lora_A[key].weight for key in here])
            self.B = torch.cat([layer.lora_B[key].weight for key in here], dim=1)
        self.scales = tuple(float(layer.scaling[key]) for key in here)

    def own(self, rows: Sequence[str]) -> torch.Tensor:
        """[n, 1, R]: the scaling of a row's own expert in that expert's columns, 0 elsewhere."""
        parts = [
            torch.tensor([scale if row == key else 0.0 for row in rows], dtype=self.A.dtype)[:, None].expand(-1, rank)
            for (key, rank), scale in zip(self.ranks, self.scales)
        ]
        return torch.cat(parts, dim=1)[:, None].to(self.A.device)

    def added(self, x: torch.Tensor, output: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The base's output with the changes added in place.

        Args:
            x: what goes into the layer, [n, T, in].
            output: of the base, [n, T, out].
            own: of the n rows.
        """
        change = linear(linear(x.to(self.A.dtype), self.A).mul_(own), self.B)
        return output.add_(change.to(output.dtype))


class Stacks:
    """All layers' stacks for the batch that is running; kept while the experts in it stay the same."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of everything: an expert has come or gone."""
        self._keys: tuple[str, ...] = ()
        self._stacks: dict[int, Stacked] = {}
        self._rows: tuple[str, ...] = ()
        self._own: dict[Any, torch.Tensor] = {}

    def begin(self, rows: Sequence[str], base: str) -> None:
        """Set whose rows the next passes have.

        Args:
            rows: PEFT's name of each row's expert.
            base: the name that stands for none.
        """
        keys = tuple(sorted(set(rows) - {base}))
        if keys != self._keys:
            self.clear()
            self._keys = keys
        if tuple(rows) != self._rows:
            self._rows, self._own = tuple(rows), {}

    def added(self, layer: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of a layer with each row's own change.

        Raises:
            ValueError: a batch of another size, such as one that a search has made wider.
        """
        if len(x) != len(self._rows):
            raise ValueError(f"the number of inputs is {len(x)}, and experts were given for {len(self._rows)} rows")
        stack = self._stacks.get(id(layer))
        if stack is None:
            stack = self._stacks[id(layer)] = Stacked(layer, self._keys)
        if not stack.ranks:
            return output
        kind = (stack.ranks, stack.scales, stack.A.device, stack.A.dtype)
        if kind not in self._own:
            self._own[kind] = stack.own(self._rows)
        return stack.added(x, output, self._own[kind])


def plain(layer: Any) -> bool:
    """Whether all changes of a LoRA layer are two matrix products on a linear layer, and nothing else."""
    return (
        not len(layer.lora_embedding_A)
        and not len(layer.lora_variant)
        and all(isinstance(part, torch.nn.Linear) and part.bias is None for part in layer.lora_A.values())
        and all(isinstance(part, torch.nn.Linear) and part.bias is None for part in layer.lora_B.values())
    )
