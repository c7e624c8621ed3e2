"""How a decoder block is built, seen by running it once: names of its parts differ between families.

A block adds to the stream of hidden states twice, after attention and after its feed-forward part. What is last in
each of the two branches (a projection, or a norm behind it) is found by what is called, on what, and in which order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from retain.errors import ModelError
from retain.models import params


@dataclass
class Call:
    """A call of a module inside a block: its first tensor in and out."""

    module: torch.nn.Module
    given: torch.Tensor | None
    made: torch.Tensor | None


@dataclass
class Block:
    """A decoder block and the calls that one forward pass made in it, in the order in which they ended."""

    layer: torch.nn.Module
    calls: list[Call]

    @property
    def attention(self) -> torch.nn.Module:
        """The outermost attention module.

        Raises:
            ModelError: none was called.
        """
        found = [m for m in self.layer.modules() if "Attention" in type(m).__name__]
        called = {id(call.module) for call in self.calls}
        first = next((m for m in found if id(m) in called), None)
        if first is None:
            raise ModelError(
                f"model: {type(self.layer).__name__} calls no module whose class is named Attention, so where it adds "
                "to its hidden states is not known. Use `lora` with this model."
            )
        return first

    def writers(self) -> list[torch.nn.Module]:
        """What writes into the stream last, after attention and after the feed-forward part: with these at zero the
        block changes nothing. A linear layer each, or the norm behind it, where there is one (Gemma 2).

        Raises:
            ModelError: a branch without a linear layer (experts).
        """
        found = [self._writer(attention=True), self._writer(attention=False)]
        for name, module in zip(("attention", "feed-forward part"), found):
            if module is None:
                raise ModelError(
                    f"model: the {name} of {type(self.layer).__name__} calls no linear layer that can be set to zero. "
                    "Use `lora` or `bottleneck` with this model."
                )
        return [module for module in found if module is not None]

    def sites(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Modules whose outputs are added to the stream: of attention, and of the feed-forward part.

        Where a family has no module for its feed-forward part (OPT) the second is the whole block.
        """
        norm = self._writer(attention=True)
        children = {id(m) for m in self.layer.children() if any(True for _ in m.parameters())}
        last = [call.module for call in self.calls if id(call.module) in children][-1]
        # PEFT replaces linear layers, which would take along what is fixed to them
        after_attention = self.attention if norm is None or is_linear(norm) else norm
        return after_attention, self.layer if is_linear(last) else last

    def _writer(self, attention: bool) -> torch.nn.Module | None:
        """The last linear layer inside or outside of attention, or the norm that is called on what it gave."""
        inside = {id(m) for m in self.attention.modules()}
        calls = [c for c in self.calls if is_linear(c.module) and (id(c.module) in inside) == attention]
        for other in self.calls if calls else ():
            norm = "Norm" in type(other.module).__name__ and any(True for _ in other.module.parameters())
            if norm and other.given is calls[-1].made and other.given is not None:
                return other.module
        return calls[-1].module if calls else None


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer, stored either way round, or one with an adapter of PEFT in it."""
    return isinstance(module, (torch.nn.Linear, Conv1D)) or hasattr(module, "base_layer")


def blocks(model: Any) -> list[Block]:
    """The decoder blocks, bottom first, with the calls of one forward pass over a few tokens."""
    found = [Block(layer, []) for layer in params.decoder_layers(model)]
    handles = []
    for block in found:

        def note(module: Any, args: Any, kwargs: Any, output: Any, calls: list[Call] = block.calls) -> None:
            calls.append(Call(module, _first((*args, *kwargs.values())), _first(output)))

        handles += [m.register_forward_hook(note, with_kwargs=True) for m in block.layer.modules()]
    try:
        predict(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def predict(model: Any, length: int = 6) -> torch.Tensor:
    """Logits [1, T, V] of a few tokens, in eval mode; the same tokens every time."""
    whole = params.causal(model)
    embedding = whole.get_input_embeddings().weight
    ids = torch.arange(length, device=embedding.device)[None] * 7 % len(embedding)
    config = whole.config.get_text_config(decoder=True)
    attention = config._attn_implementation
    if ids.is_meta:
        config._attn_implementation = "eager"  # others look at the values of the mask, to see whether they need one
    try:
        with params.evaluating(whole):
            return whole(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        config._attn_implementation = attention


def _first(value: Any) -> torch.Tensor | None:
    if torch.is_tensor(value):
        return value
    return next((v for v in value if torch.is_tensor(v)), None) if isinstance(value, tuple | list) else None
