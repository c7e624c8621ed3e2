"""A model's folder in safetensors, read and written piece by piece: no more of it is in memory than was asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retain.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_BEGIN = 1 << 24  # bytes after which they are sent to the disk
#: Settings → tensors that are another one, as name → name.
_TIED: dict[str, dict[str, str]] = {}


@dataclass
class Checkpoint:
    """The tensors of a model's folder, read piece by piece.

    Raises:
        ModelError: no safetensors, a file that is missing or damaged, or weights that are quantised.
    """

    folder: Path
    _open: dict[str, _File] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if "quantization_config" in self.settings:
            raise ModelError(
                f"{self.folder}: its weights are quantised, and merging rounds them once more. "
                "Give the model in bfloat16 or float32."
            )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.folder / "config.json")

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name → file name, in the order of the files."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            found = read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise ModelError(f"{index}: has no weight_map. Copy the model again.")
            return found
        if not (self.folder / "model.safetensors").is_file():
            raise ModelError(
                f"{self.folder}: has no model.safetensors and no index of several. "
                "Open the model with transformers and write it with save_pretrained."
            )
        return dict.fromkeys(self._file("model.safetensors").header, "model.safetensors")

    @cached_property
    def stored(self) -> list[str]:
        """Names of the tensors without those that the model takes from another one (tied), should they be there."""
        if self.settings.get("tie_word_embeddings") is False:
            return list(self.files)
        text = json.dumps(self.settings, sort_keys=True)
        if text not in _TIED:  # a model without weights is made for it, once for models of one kind
            _TIED[text] = _tied(self.folder)
        tied = _TIED[text]
        return [name for name in self.files if tied.get(name) not in self.files]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor.

        Raises:
            ModelError: one that is not merged, such as float8.
        """
        kind = self._entry(name)["dtype"]
        if kind not in _DTYPES:
            raise ModelError(f"{self.folder}: '{name}' is {kind}. Merged are {', '.join(_DTYPES)}.")
        return _DTYPES[kind]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or the rows start … stop of it, as a new one in its own dtype; a scalar is read whole."""
        shape, kind = self.shape(name), self.dtype(name)
        file, (begin, end) = self._file(self.files[name]), self._entry(name)["data_offsets"]
        if rows is not None and shape:
            row = (end - begin) // max(1, shape[0])
            begin, shape = begin + rows.start * row, (rows.stop - rows.start, *shape[1:])
        found = torch.empty(shape, dtype=kind)
        if found.numel():
            file.read(begin, found.reshape(-1).view(torch.uint8).numpy().data)
        return found

    def _entry(self, name: str) -> dict[str, Any]:
        header = self._file(self.files[name]).header
        if name not in header:
            raise ModelError(f"{self.folder / self.files[name]}: has no '{name}', which its index names.")
        return header[name]

    def _file(self, name: str) -> _File:
        if name not in self._open:
            self._open[name] = _File(self.folder / name)
        return self._open[name]


def _tied(folder: Path) -> dict[str, str]:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return getattr(AutoModelForCausalLM.from_config(config), "all_tied_weights_keys", None) or {}
    except (ValueError, OSError, ImportError):  # code of its own: nothing is known but the names
        return {}


class _File:
    """A file in safetensors: eight bytes of length, a header in JSON, the tensors' bytes.

    `safe_open` either maps the file, and what was touched then counts as memory for as long as it is open, or reads
    the whole of a tensor for each slice of it. So that it checks the file, and pieces are read from where they lie.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, "pt"):
                pass
            self._handle = open(path, "rb", buffering=0)  # noqa: SIM115  (as long as the checkpoint is in use)
            length = int.from_bytes(self._handle.read(8), "little")
            self.header: dict[str, Any] = json.loads(self._handle.read(length))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read ({error}). Copy the model again.") from error
        self.header.pop("__metadata__", None)
        self._path, self._start = path, 8 + length

    def read(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from a place in the tensors' bytes."""
        self._handle.seek(self._start + offset)
        while len(into):
            got = self._handle.readinto(into) or 0
            if not got:
                raise ModelError(f"{self._path}: became shorter while it was read. Copy the model again.")
            into = into[got:]


class Writer:
    """A file in safetensors, written piece by piece: the library's own writer wants all at once, and copies them.

    Args:
        path: must not exist yet.
        tensors: name → dtype and shape; written in the order of `order`.

    Raises:
        ModelError: on leaving, when a tensor is not whole.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        # wide numbers first, so that every tensor begins at a multiple of the size of its numbers
        self.order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
        names = {kind: name for name, kind in _DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._left: dict[str, int] = {}
        self._waiting = 0
        begin = 0
        for name in self.order:
            kind, shape = tensors[name]
            self._left[name] = math.prod(shape) * kind.itemsize
            end = begin + self._left[name]
            header[name] = {"dtype": names[kind], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._path, self._handle = path, open(path, "xb", buffering=0)  # noqa: SIM115  (closed on leaving)
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, piece: Tensor) -> None:
        """The next piece of a tensor, from its beginning on; tensors follow each other as in `order`."""
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._left[name] -= len(data)
        self._put(data)
        self._waiting += len(data)
        if self._waiting >= _BEGIN and hasattr(
            os, "posix_fadvise"
        ):  # the disk works while the next pieces are computed
            os.posix_fadvise(self._handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._waiting = 0

    def _put(self, data: memoryview) -> None:
        while len(data):
            data = data[self._handle.write(data) :]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._handle.close()
        odd = next((name for name, left in self._left.items() if left), None)
        if error is None and odd is not None:
            raise ModelError(f"{self._path}: '{odd}' is {self._left[odd]} bytes short. Merge again.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: not there, or not one.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error}). Give a folder with a whole model.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: is no JSON object. Copy the model again.")
    return found
