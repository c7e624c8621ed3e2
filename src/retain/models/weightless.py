"""Passes of a model without its weights: what they would compute, move and keep in memory.

The model is built from its configuration on fake tensors, which have a shape and a type but no memory. Every
operation that a pass calls is counted on the way, so the numbers are those of this architecture with these
adapters and frozen layers, checkpointing and autocast included; nothing about the architecture is assumed.
Tensors are taken to be on a CPU, whichever device the training will use.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from retain.config import ModelConfig
from retain.errors import ModelError
from retain.models import hub
from retain.models.load import adapter_base, resolve

aten: Any = torch.ops.aten
#: Tensors of this many bytes or more get their memory from the system, whatever was released before: the largest
#: M_MMAP_THRESHOLD of glibc on 64 bits.
MAPPED_ALONE = 2**25
#: Bytes of a weight in 8 bits, and in 4 with a scale per 64 weights that is itself in 8 bits (Dettmers et al. 2023,
#: arXiv:2305.14314, section 3: 0.127 bits for the scales).
QUANTISED = {"8bit": 1.0, "4bit": (4 + 0.127) / 8}


@dataclass
class Cost:
    """What a pass takes.

    Args:
        operations: (kind, floating-point operations, bytes read and written) of a call → how often it came. The kind
            is the type that is computed in, such as "bfloat16", or "attention".
        held: most bytes alive at once of `weights_cast` (half-precision copies of weights), `gradients`, `states`
            (of an optimizer that stepped) and `activations` (everything else that the pass made).
        mapped: bytes of memory that a CPU's allocator asks the system for, again in every pass.
    """

    operations: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    held: dict[str, int] = field(default_factory=dict)
    mapped: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products and attention."""
        return sum(flops * count for (_, flops, _), count in self.operations.items())

    def __add__(self, other: Cost) -> Cost:
        """One pass after the other; memory that both hold is added."""
        held = {name: self.held.get(name, 0) + other.held.get(name, 0) for name in self.held | other.held}
        return Cost(self.operations + other.operations, held, self.mapped + other.mapped)


class Weightless:
    """A model without weights, and passes of it.

    Args:
        config: as for `load_model`; quantised weights are stood for by bfloat16 ones, which is what they become
            one layer at a time.
        dtype: type that all weights have in the passes, instead of the one that they are loaded in (`self.dtype`).

    Raises:
        ModelError: there is no such model, or it is no causal language model.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        where = resolve(config.name)
        while (adapter := Path(where) / "adapter_config.json").is_file():  # it will be merged
            where = adapter_base(adapter)
        hub.require(where, config.revision)
        options = {"trust_remote_code": config.trust_remote_code}
        try:
            settings = AutoConfig.from_pretrained(where, revision=config.revision, **options)
            self.dtype = settings.dtype or torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
            with torch.device("meta"):
                self.model: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype or self.dtype, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise ModelError(
                f"model.name: no model can be built from '{config.name}' ({reason}). Give `starter`, a folder with "
                "config.json, or a hub id that is reachable."
            ) from error

    def bytes(self, quantize: str = "none") -> int:
        """Memory of the weights as they will be loaded."""
        whole = sum(p.numel() for p in self.model.parameters())
        if quantize == "none":
            return whole * self.dtype.itemsize
        head = self.model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        return int(linear * QUANTISED[quantize]) + 4 * (whole - linear)  # the rest is made float32 for training

    def begin(self) -> None:
        """Take the model from meta tensors, on which methods prepare it, to fake ones, on which it runs."""
        known: dict[int, Any] = {}  # tied weights stay tied
        with self.mode:
            for module in self.model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, old in tensors.items():
                        if old is None:
                            continue
                        if id(old) not in known:
                            new = torch.empty_like(old, device="cpu")
                            known[id(old)] = (
                                torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new
                            )
                        tensors[name] = known[id(old)]

    def count(self, work: Callable[[Any], Any], casts: bool = True) -> Cost:
        """The cost of `work(model)`; an optimizer that it returns is looked at for its states.

        Args:
            casts: count the casts of weights to half precision; False where autocast keeps them between passes.

        Raises:
            RuntimeError: an operation of the model cannot be done without values.
        """
        learning = [p for p in self.model.parameters() if p.requires_grad]
        with self.mode, _quiet(), _Tally({_address(p) for p in self.model.parameters()}, casts) as tally:
            optimizer = work(self.model)
            states = tree_leaves(list(optimizer.state.values())) if optimizer is not None else []
            kinds = {"gradients": [p.grad for p in learning if p.grad is not None], "states": states}
            cost = Cost(tally.operations, *tally.memory(kinds))
            for parameter in learning:
                parameter.grad = None
        return cost


class _Tally(TorchDispatchMode):
    """Counts what every operation computes and moves, and follows the memory that it makes."""

    def __init__(self, weights: set[int], casts: bool) -> None:
        super().__init__()
        self._count_casts = casts
        self.operations: Counter[tuple[str, int, int]] = Counter()
        self._weights = weights
        self._events: list[tuple[int, int]] = []  # (number of a storage, bytes; negative when it is released)
        self._alive: dict[int, int] = {}  # address → number
        self._casts: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.prim.device.default:
            return args[0].fake_device  # asked several times per operation
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation.namespace not in ("aten", "prims"):
            return result  # questions of the fake tensors themselves
        given, made = _tensors((args, kwargs)), _tensors(result)
        before = {_address(t) for t in given}
        new = {_address(t): t for t in made if _address(t) not in before}
        cast = operation._overloadpacket is aten._to_copy and bool(before & self._weights)
        if (operation._schema.is_mutable or new) and (self._count_casts or not cast):  # a view moves nothing
            self._note(operation, args, kwargs, result, given, made)
        for address, tensor in new.items():
            if address not in self._alive:
                self._follow(address, tensor.untyped_storage(), cast)
        return result

    def _note(self, operation: Any, args: Any, kwargs: Any, result: Any, given: list, made: list) -> None:
        packet = operation._overloadpacket
        if packet.__name__.startswith(("empty", "new_empty")):
            return
        formula = _FLOPS.get(packet)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
        moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*given, *made))
        kind = "attention" if "attention" in packet.__name__ else kind_of((given or made)[0].dtype)
        self.operations[kind, flops, moved] += 1

    def _follow(self, address: int, storage: Any, cast: bool) -> None:
        number, size = len(self._events), storage.nbytes()
        self._alive[address] = number
        self._events.append((number, size))
        if cast:
            self._casts.add(number)
        weakref.finalize(storage, self._release, address, number, size)

    def _release(self, address: int, number: int, size: int) -> None:
        self._alive.pop(address, None)
        self._events.append((number, -size))

    def memory(self, kinds: dict[str, Iterable[Any]]) -> tuple[dict[str, int], int]:
        """Most bytes alive at once of each kind, told by tensors that are still there, and of the rest; bytes mapped.

        The system gives memory of a large tensor anew each time, that of small ones once as their number grows
        (glibc, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
        """
        belongs = dict.fromkeys(self._casts, "weights_cast")
        for kind, tensors in kinds.items():
            belongs |= {self._alive[_address(t)]: kind for t in _tensors(tensors) if _address(t) in self._alive}
        now: Counter[str] = Counter()
        most = dict.fromkeys(("weights_cast", "activations", *kinds), 0)
        large = small = smalls = 0
        for number, size in self._events:
            kind = belongs.get(number, "activations")
            now[kind] += size
            most[kind] = max(most[kind], now[kind])
            if kind == "states":
                continue  # made once
            if abs(size) >= MAPPED_ALONE:
                large += max(0, size)
            else:
                smalls += size
                small = max(small, smalls)
        return most, large + small


def kind_of(dtype: torch.dtype) -> str:
    """The name of a type, as `Cost.operations` has it."""
    return str(dtype).removeprefix("torch.")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _grouped(left: Any, right: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    """Products of rows [m, k] with the matrix [k, n] of their group, one of [groups, k, n]; or [k, m] by [m, n]."""
    return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(slope: Any, query: Any, key: Any, value: Any, *rest: Any, out_val: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(slope.shape, query.shape, key.shape, value.shape)


_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _quiet:
    """Fake tensors report what they cannot do at length before they raise it."""

    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def __enter__(self) -> None:
        self.before = self.logger.level
        self.logger.setLevel(logging.CRITICAL)

    def __exit__(self, *error: Any) -> None:
        self.logger.setLevel(self.before)
