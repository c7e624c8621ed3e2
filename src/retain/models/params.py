"""Parameters of a model, whatever it is wrapped in: the only file that knows PEFT, DDP and shards.

Names are those of the causal language model itself (`model.layers.0.self_attn.q_proj.weight`, with
`lora_A.default` inside where there is an adapter), so that they are the same wrapped and unwrapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

Tensors = dict[str, torch.Tensor]


def causal(model: Any) -> Any:
    """The causal language model under DDP, compilation and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            return model.get_base_model()
        else:
            return model


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters that learn, by name; tied ones once."""
    return {name: p for name, p in causal(model).named_parameters() if p.requires_grad}


def counts(model: Any) -> tuple[int, int]:
    """(trainable, all) parameter counts; tied ones once. A 4-bit weight counts its stored elements."""
    parameters = list(causal(model).parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def snapshot(parameters: dict[str, torch.nn.Parameter]) -> Tensors:
    """Detached copies, full precision for half-precision weights (small pulls vanish in bf16)."""
    return {
        name: p.detach().to(torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype, copy=True)
        for name, p in parameters.items()
    }


def aligned(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`tensor` placed as `parameter` is: same device, and the same shards when it is sharded."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        placed = tensor.to(parameter.device_mesh.device_type)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements)
    return tensor if isinstance(tensor, DTensor) else tensor.to(parameter.device)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that lives on this rank (shares memory); a plain tensor is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """`local` for a list, for fused element-wise operations."""
    return [local(t) for t in tensors]


@dataclass
class LoraPair:
    """One adapted linear layer: ΔW = scaling · B A.

    Shapes: A [r, in], B [out, r], base [out, in].
    """

    name: str
    A: torch.nn.Parameter
    B: torch.nn.Parameter
    scaling: float
    base: torch.nn.Parameter
    transposed: bool = False  # the base stores [in, out] (GPT-2's Conv1D)


def lora_pairs(model: Any) -> dict[str, LoraPair]:
    """Trainable LoRA pairs of the active adapter, by module name; empty without LoRA."""
    from peft.tuners.lora import LoraLayer

    pairs = {}
    for name, module in causal(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_A and module.lora_A[adapter].weight.requires_grad:
                a: Any = module.lora_A[adapter]
                b: Any = module.lora_B[adapter]
                base: Any = module.get_base_layer()
                pairs[name] = LoraPair(
                    name,
                    a.weight,
                    b.weight,
                    float(module.scaling[adapter]),
                    base.weight,
                    bool(getattr(module, "fan_in_fan_out", False)),
                )
    return pairs


def outside_lora(model: Any) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters that are not LoRA factors."""
    factors = {id(p) for pair in lora_pairs(model).values() for p in (pair.A, pair.B)}
    return {name: p for name, p in trainable(model).items() if id(p) not in factors}


def head(model: Any, weights: Tensors | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [V, H], bias or None) of the output layer, with `weights` in place of current parameters."""
    whole = causal(model)
    layer = whole.get_output_embeddings()
    found: list[torch.Tensor | None] = []
    for tensor in (layer.weight, getattr(layer, "bias", None)):
        name = next((n for n, p in whole.named_parameters() if p is tensor), None) if weights else None
        value = weights.get(name, tensor) if weights and name else tensor
        if value is not None and tensor is not None:
            value = value.to(tensor.dtype)
        found.append(value.full_tensor() if isinstance(value, DTensor) else value)
    return found[0], found[1]  # type: ignore[return-value]


def logit_rules(model: Any) -> tuple[float, float | None]:
    """(scale, soft cap) that the architecture applies to its logits; (1.0, None) for most."""
    config = causal(model).config.get_text_config()
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, key, None) is not None:
            return float(getattr(config, key)), getattr(config, "final_logit_softcapping", None)
    scaling = getattr(config, "logits_scaling", None)
    scale = 1.0 if scaling is None else (scaling if config.model_type == "hyperclovax" else 1 / scaling)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def hidden_states(model: Any, inputs: dict[str, Any], weights: Tensors | None = None) -> torch.Tensor:
    """Last hidden states [B, T, H] of the backbone, as if `weights` were its parameters.

    With `weights` the live parameters are replaced for this call only (nothing is copied or moved), which
    makes the model its own teacher at an earlier point.
    """
    whole = causal(model)
    backbone = whole.base_model
    inputs = {**inputs, "use_cache": False}
    if weights is None:
        return backbone(**inputs).last_hidden_state
    prefix = whole.base_model_prefix + "."
    inner = {name[len(prefix) :]: t for name, t in weights.items() if name.startswith(prefix)}
    # copies of half-precision weights are wider; beside weights that do not learn they must fit
    inner = {name: t.to(backbone.get_parameter(name).dtype) for name, t in inner.items()}
    return torch.func.functional_call(backbone, inner, (), inputs).last_hidden_state


@contextmanager
def captured_hidden(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the backbone's last hidden states while a block runs, so a loss need not run it again."""
    seen: list[torch.Tensor] = []
    handle = causal(model).base_model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state)
    )
    try:
        yield seen
    finally:
        handle.remove()


def computes_bf16(device: str | torch.device) -> bool:
    """Whether bfloat16 is fast on a device: most GPUs, and CPUs with AVX512-BF16 or AMX."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode without dropout for a block; the training flag is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The base model without its adapters for a block; what is trainable stays as it was.

    PEFT's own `disable_adapter` sets `requires_grad` again on leaving, which would undo freezing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in causal(model).modules() if isinstance(m, BaseTunerLayer) and not m._disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def begins_at_base(model: Any, start: Tensors) -> bool:
    """Whether the model with the weights `start` is the model without adapters: LoRA alone learns, and every B is 0."""
    pairs = lora_pairs(model).values()
    names = {id(p): name for name, p in trainable(model).items()}
    factors = {names[id(p)] for pair in pairs for p in (pair.A, pair.B)}
    return bool(factors) and start.keys() <= factors and not any(start[names[id(pair.B)]].any() for pair in pairs)


@contextmanager
def casts_kept(model: Any) -> Iterator[None]:
    """Lets autocast keep its half-precision copies of frozen weights between the forward passes of a block.

    It keeps copies of weights that require a gradient only; without this, every token that is written casts
    all frozen weights again. For blocks without gradients.
    """
    frozen = [p for p in causal(model).parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The decoder blocks, bottom first: the longest list of blocks of one class inside the backbone."""
    candidates = [
        m
        for m in causal(model).base_model.modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) and len({type(b) for b in m}) == 1
    ]
    return max(candidates, key=lambda m: (len(m), sum(p.numel() for p in m.parameters())))


def input_modules(model: Any) -> list[torch.nn.Module]:
    """What lies below the first decoder layer: embeddings of tokens and positions, and what acts on them.

    Found by kind and by name, not by running the model: a model without weights, or in shards, must do.
    """
    whole = causal(model)
    tokens, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    elsewhere = {id(m) for part in (decoder_layers(model), head) if part is not None for m in part.modules()}
    hidden = getattr(whole.config.get_text_config(decoder=True), "hidden_size", None)

    def below(name: str, module: torch.nn.Module) -> bool:
        # norms of embeddings, and what else a family keeps with them, have "embed" somewhere in their names
        if isinstance(module, torch.nn.Embedding) or "embed" in name:
            return True
        # embeddings narrower than the model are widened by a matrix first (OPT-350m)
        width = tokens.weight.shape[-1]
        return width != hidden and isinstance(module, torch.nn.Linear) and tuple(module.weight.shape) == (hidden, width)

    return [tokens] + [m for name, m in whole.named_modules() if id(m) not in elsewhere and below(name, m)]
