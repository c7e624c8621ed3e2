"""Extra passes through a model: gradients of a loss outside the trainer's own, and what goes into its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from retain.models import params
from retain.models.params import LoraPair, Tensors

#: (inputs of the model, labels [B, T])
Batch = tuple[dict[str, Any], torch.Tensor]

#: accelerate's name of a mixed precision → the type that its autocast computes in.
HALF = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}
#: Hosts that hold the whole model in half precision instead, without autocast.
OWN_PRECISION = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def precision(device: torch.device, scaled: bool = True) -> AbstractContextManager[Any]:
    """The student's arithmetic, for a pass that does not go through the model's wrapped `forward`.

    A host computes in half precision inside that `forward` alone; any other pass, also of the same weights on the same
    rows, would be in full precision and differ from the student by rounding.

    Args:
        scaled: whether the gradients of the pass are scaled with the main loss, or there are none. Others would vanish
            in float16, so that their pass stays in full precision.
    """
    state = AcceleratorState() if AcceleratorState._shared_state else None
    half = None if state is None or state.distributed_type in OWN_PRECISION else HALF.get(state.mixed_precision)
    if half is None:
        return nullcontext()
    return torch.autocast(device.type, half, enabled=scaled or half != torch.float16)


def gradients(
    model: Any,
    parameters: Sequence[torch.Tensor],
    batches: Iterable[Batch],
    loss: Callable[[Any, dict[str, Any], torch.Tensor], torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> tuple[list[torch.Tensor], float, float]:
    """Gradient of a loss summed over batches and ranks, in tensors of its own; `.grad` is not touched.

    Args:
        parameters: with respect to which; one that a batch does not reach has a gradient of 0.
        batches: of this rank; may be none.
        loss: (model, inputs, labels) → scalar.
        reduce: sum of a tensor over all ranks.

    Returns:
        (gradient per parameter, loss, supervised tokens).
    """
    found = [torch.zeros_like(p) for p in parameters]
    counts = torch.zeros(2, dtype=torch.float64)
    for inputs, labels in batches:
        with precision(labels.device, scaled=False):
            value = loss(model, inputs, labels)
        for total, part in zip(found, torch.autograd.grad(value, parameters, allow_unused=True)):
            if part is not None:
                total.add_(part)
        counts += torch.tensor([float(value.detach()), float((labels[:, 1:] != -100).sum())], dtype=torch.float64)
    value, tokens = reduce(counts.to(parameters[0].device) if parameters[0].device.type != "mps" else counts).tolist()
    return [reduce(total) for total in found], value, tokens


@dataclass
class Linear:
    """A linear layer of a decoder block. `learns` is its weight, or the factors of its adapter.

    Shapes: weight [out, in], or [in, out] where `transposed` (GPT-2's Conv1D).
    """

    name: str  # of the layer, the same with and without an adapter
    module: torch.nn.Module
    weight: torch.nn.Parameter
    transposed: bool
    pair: LoraPair | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), also where a quantised weight is stored in another shape."""
        if self.pair is not None:
            return self.pair.B.shape[0], self.pair.A.shape[1]
        out, into = self.oriented(self.weight).shape
        return out, into

    def oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as [out, in]."""
        return weight.T if self.transposed else weight


def linear_layers(model: Any) -> list[Linear]:
    """The linear layers inside decoder blocks that learn, by their weight or by a LoRA pair."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(m) for block in params.decoder_layers(model) for m in block.modules()}
    pairs = {id(pair.base): pair for pair in params.lora_pairs(model).values()}
    found = []
    for name, module in params.causal(model).named_modules():
        if id(module) not in inside or not isinstance(module, (torch.nn.Linear, Conv1D)) or ".lora_" in name:
            continue
        weight: Any = module.weight
        pair = pairs.get(id(weight))
        if pair is not None or weight.requires_grad:
            transposed = isinstance(module, Conv1D)
            found.append(Linear(name.removesuffix(".base_layer"), module, weight, transposed, pair))
    return found


def new_adapters(model: Any, start: Mapping[str, torch.Tensor]) -> bool:
    """Whether every adapter changes nothing at the start, so that its factor A may be chosen anew."""
    names = {id(p): name for name, p in params.trainable(model).items()}
    return not any(bool(start[names[id(pair.B)]].any()) for pair in params.lora_pairs(model).values())


@torch.no_grad()
def input_sums(
    model: Any, layers: Sequence[Linear], batches: Iterable[Batch], products: bool, skip_first: bool = False
) -> Tensors:
    """Σ x xᵀ [in, in] or Σ x² [in] over the inputs x of linear layers, by layer name, in float32 or wider.

    Args:
        batches: rows to run; padding does not count, answers and prompts do.
        products: sums of products of all pairs, or of squares alone.
        skip_first: leave out the first token of each row, which many models use as an attention sink.
    """
    sums: Tensors = {}
    counted: list[torch.Tensor] = []

    def see(layer: Linear) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x, mask = args[0].detach(), counted[-1]
            x = x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
            x = x if x.dtype == torch.float64 else x.float()
            with torch.autocast(x.device.type, enabled=False):
                part = x.T @ x if products else x.square().sum(0)
            sums[layer.name] = sums[layer.name] + part if layer.name in sums else part

        return hook

    handles = [layer.module.register_forward_pre_hook(see(layer)) for layer in layers]
    try:
        for inputs, labels in batches:
            mask = inputs.get("attention_mask")
            real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
            if skip_first:
                real = real & (inputs["position_ids"] != 0 if "position_ids" in inputs else real.cumsum(1) != 1)
            counted.append(real)
            params.hidden_states(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sums
