"""Experts in memory: one base model, the adapters that are in use, and which of them acts on which row.

All adapted layers look at one list that names the adapter that acts. Switching changes this list; no weight moves.
What is loaded stays beside the base until room is needed, and then the expert that was asked longest ago goes first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open

from retain.errors import ModelError
from retain.experts.adapter import WEIGHTS
from retain.experts.library import ExpertLibrary
from retain.experts.mixed import Joined, Rows

_BASE = "__base__"  # PEFT's name for rows without an adapter


@dataclass(frozen=True)
class _Loaded:
    key: str  # PEFT's name for it: an expert's own may hold a dot, or be a word of torch
    bytes: int
    stamp: tuple[int, int] | None


class AdapterPool:
    """The experts of a library on one model.

    One batch runs at a time: hold `lock` from `activate` to the end of the pass; `rows` holds it itself. The experts of
    a batch with several are held a second time, side by side (`mixed.Joined`), until another set of them is asked.

    Args:
        model: the base, without adapters; it stays usable as it is, and is what passes are called on.
        library: of experts for it.
        limit: bytes that the loaded experts may take; None for no limit.
    """

    def __init__(self, model: Any, library: ExpertLibrary, limit: int | None = None) -> None:
        self.model, self.library, self.limit = model, library, limit
        self.lock = threading.RLock()
        self.active: str | None = None
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the one asked longest ago first
        self._peft: PeftModel | None = None
        self._layers: list[Any] = []  # those that PEFT adapted, each a LoraLayer
        self._acting: list[str] = []  # PEFT's name for the active one; every layer holds this very list
        self._rows: Rows | None = None  # of the batch that is running, where they differ
        self._joined = Joined(frozenset())  # factors of the experts of the last such batch
        self._in_batch: frozenset[str] = frozenset()
        self._made = 0

    @property
    def loaded(self) -> list[str]:
        """The experts in memory, the one asked longest ago first."""
        with self.lock:
            return list(self._loaded)

    @property
    def bytes(self) -> int:
        """Memory of the loaded experts' tensors."""
        with self.lock:
            return sum(one.bytes for one in self._loaded.values())

    def fits(self, names: Iterable[str | None]) -> bool:
        """Whether these experts can be in memory at the same time.

        Raises:
            ConfigError: an expert that is not in the library.
        """
        return self.limit is None or sum(self._size(name) for name in set(names) - {None}) <= self.limit

    def ensure(self, names: Iterable[str | None]) -> None:
        """Load what is missing of these experts; None, for the base, needs nothing.

        Raises:
            ConfigError: an expert that is not in the library, or no longer.
            ModelError: it cannot be loaded, or they take more than the limit together.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        with self.lock:
            for name in wanted:
                known = self._loaded.get(name)
                if known is not None and known.stamp != self.library.stamp(name) and not self._in_use(name):
                    self._unload(name)  # removed, or another one has its name now
            self._make_room(wanted)
            for name in wanted:
                if name not in self._loaded:
                    self._load(name)
                self._loaded.move_to_end(name)

    def activate(self, name: str | None) -> None:
        """Let one expert answer, or the base with None; loads it when it is not there.

        Raises:
            ConfigError, ModelError: as `ensure`; or inside of `rows`.
        """
        with self.lock:
            if self._in_batch:
                raise ModelError("activate: a batch with rows of its own is running. Switch before or after it.")
            before, self.active = self.active, None  # the one that answered may make room
            try:
                self.ensure([name])
            except Exception:
                self.active = before if before in self._loaded else None
                self._point()
                raise
            self.active = name
            self._point()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Let every row of the batches in this context have its own expert; nobody else runs a batch meanwhile.

        Args:
            names: one per row, None for the base.

        Raises:
            ConfigError, ModelError: as `ensure`.
        """
        with self.lock:
            self.ensure(names)
            before = self._rows, self._in_batch, list(self._acting)
            keys = [None if name is None else self._loaded[name].key for name in names]
            self._in_batch = frozenset(name for name in names if name is not None)
            alike = len(set(keys)) < 2
            self._rows = None if alike else self._mixed(keys)
            self._acting[:] = [key for key in keys[:1] if key is not None] if alike else []
            try:
                yield
            finally:
                self._rows, self._in_batch, self._acting[:] = before

    # -- inside --------------------------------------------------------------------------------------------
    def _size(self, name: str | None) -> int:
        assert name is not None
        return self._loaded[name].bytes if name in self._loaded else self.library.card(name).bytes

    def _in_use(self, name: str) -> bool:
        return name == self.active or name in self._in_batch

    def _make_room(self, wanted: list[str]) -> None:
        sizes = {name: self._size(name) for name in wanted}  # also finds out whether they are there
        if self.limit is None:
            return
        staying = {name for name in self._loaded if name in sizes or self._in_use(name)}
        needed = sum(sizes.values()) + sum(self._loaded[name].bytes for name in staying - sizes.keys())
        if needed > self.limit:
            raise ModelError(
                f"experts {', '.join(sorted(sizes.keys() | staying))}: {needed:,} bytes together, and {self.limit:,} "
                "are allowed. Raise the limit, or ask fewer of them at once."
            )
        coming = sum(size for name, size in sizes.items() if name not in self._loaded)
        for name in [name for name in self._loaded if name not in staying]:
            if self.bytes + coming <= self.limit:
                return
            self._unload(name)

    def _load(self, name: str) -> None:
        folder, stamp = self.library.path(name), self.library.stamp(name)
        key = f"expert{self._made}"
        self._made += 1
        try:
            self._read(folder, key)
        except Exception as error:
            self._delete(key)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ModelError(f"{folder}: cannot be loaded ({first}). Remove the expert and add it again.") from error
        finally:
            self._collect()
        parts = self._parts(key)
        with safe_open(folder / WEIGHTS, "pt") as file:
            kinds = {file.get_tensor(one).dtype for one in file.keys()}  # noqa: SIM118  (it is no mapping)
        if len(kinds) == 1:  # PEFT makes float32 of smaller types, as training wants it: twice the memory
            for part in parts:
                part.data = part.data.to(*kinds)
        self._loaded[name] = _Loaded(key, sum(part.numel() * part.element_size() for part in parts), stamp)

    def _read(self, folder: Path, key: str) -> None:
        """Add an adapter to the model."""
        device = str(next(self.model.parameters()).device)
        if self._peft is None:
            config = LoraConfig.from_pretrained(str(folder))
            config.inference_mode = True
            self._peft = PeftModel(self.model, config, key)
        missing = self._peft.load_adapter(str(folder), key, torch_device=device).missing_keys
        if missing:
            raise ModelError(f"{missing[0]} is missing")

    def _collect(self) -> None:
        """Find the adapted layers, which a new expert may add to, and let all of them look at our list."""
        known = set(map(id, self._layers))
        self._layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for layer in self._layers:
            if id(layer) not in known:
                if isinstance(layer.get_base_layer(), torch.nn.Linear):
                    layer.register_forward_hook(self._add_rows)
                else:
                    layer.register_forward_pre_hook(self._tell_rows, with_kwargs=True)
            layer._active_adapter = self._acting

    def _mixed(self, keys: list[str | None]) -> Rows:
        used = frozenset(key for key in keys if key is not None)
        if used != self._joined.keys:
            self._joined = Joined(used)
        return Rows(keys, self._joined)

    def _add_rows(self, layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        """In a mixed batch no adapter acts by itself: what the base says gets each row's own."""
        return None if self._rows is None else self._rows.add(layer, args[0], output)

    def _tell_rows(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Embeddings and convolutions are left to PEFT, which goes from expert to expert."""
        if self._rows is None:
            return None
        return args, kwargs | {"adapter_names": [_BASE if key is None else key for key in self._rows.keys]}

    def _point(self) -> None:
        """Set which adapter acts. PEFT's own `set_adapter` visits all weights, to say which of them learn."""
        self._acting[:] = [] if self.active is None else [self._loaded[self.active].key]

    def _parts(self, key: str) -> list[torch.Tensor]:
        """Everything that is in memory because of one adapter."""
        found: list[torch.Tensor] = []
        for layer in self._layers:
            for kind in layer.adapter_layer_names:
                part = getattr(layer, kind)
                if key in part:
                    one = part[key]
                    found += [one] if isinstance(one, torch.Tensor) else [*one.parameters(), *one.buffers()]
        return found

    def _unload(self, name: str) -> None:
        self._delete(self._loaded.pop(name).key)
        if name == self.active:
            self.active = None

    def _delete(self, key: str) -> None:
        if self._peft is None or key not in self._peft.peft_config:
            return
        acting = list(self._acting)
        self._acting.clear()  # so that PEFT looks for no other to act instead
        self._peft.delete_adapter(key)
        self._acting[:] = [one for one in acting if one != key]
        if key in self._joined.keys:
            self._joined = Joined(frozenset())


def open_pool(library: ExpertLibrary, limit: int | None = None) -> tuple[AdapterPool, Any]:
    """(pool, tokenizer): the base of a library, opened, and its experts on it.

    Raises:
        ModelError: the library has no expert, and so no base, or the base cannot be opened.
    """
    from retain.models.load import load_model

    model, tokenizer = load_model(library.known_base())
    return AdapterPool(model.eval().requires_grad_(False), library, limit), tokenizer
