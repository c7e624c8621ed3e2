"""Which model an adapter stands on: the same weights are the same base, under whatever name they are found."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import BinaryIO

from retain.config import STARTER
from retain.errors import ModelError
from retain.models.load import resolve
from retain.models.starter import starter_found

_PARTS, _PART = 8, 512  # of every tensor so many pieces of so many bytes are looked at


def identity(name: str) -> str:
    """Tells bases from one another: a hash over names, types, shapes and some bytes of every tensor in its files.

    It does not depend on the name, the place, or how the tensors are spread over files.

    Args:
        name: `starter`, a folder, or a hub id that is in the hub's cache.

    Returns:
        The hash, or "" where no safetensors files of the model are here.

    Raises:
        ModelError: a file is damaged.
    """
    folder = _folder(name)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    digests: dict[str, bytes] = {}
    for path in files:
        try:
            with open(path, "rb") as file:
                digests |= _tensors(file)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ModelError(f"{path}: damaged ({error}). Copy or fetch the base again.") from error
    if not digests:
        return ""
    whole = hashlib.blake2b(digest_size=16)
    for tensor in sorted(digests):
        whole.update(digests[tensor])
    return whole.hexdigest()


def short(name: str) -> str:
    """`starter` for the starter's own folder; other names as they are."""
    if name == STARTER or not Path(name).is_dir():
        return name
    here = starter_found()
    return STARTER if here is not None and here.samefile(name) else str(Path(name).resolve())


def _folder(name: str) -> Path | None:
    where = Path(resolve(name))
    if where.is_dir():
        return where
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors"], local_files_only=True))
    except Exception:  # not a hub id, or not in the cache: then bases are told apart by their names
        return None


def _tensors(file: BinaryIO) -> dict[str, bytes]:
    """Tensor name → digest of its description and of bytes spread over it."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 2**30:
        raise ValueError("no safetensors file")
    header = json.loads(file.read(length))
    start, found = 8 + length, {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = about["data_offsets"]
        digest = hashlib.blake2b(f"{name} {about['dtype']} {about['shape']}".encode(), digest_size=16)
        last = max(end - begin - _PART, 0)
        for part in sorted({last * i // (_PARTS - 1) for i in range(_PARTS)}):
            file.seek(start + begin + part)
            piece = file.read(min(_PART, end - begin))
            if len(piece) < min(_PART, end - begin):
                raise ValueError("cut short")
            digest.update(piece)
        found[name] = digest.digest()
    return found
