"""Merging whole checkpoints: read and written piece by piece, visible when it is whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retain.errors import ModelError
from retain.models.merge_recipe import Combining, Pieces
from retain.models.merge_sources import Model
from retain.models.shards import Checkpoint, Writer
from retain.models.vocabulary import require_same

Progress = Callable[[int], None]
#: Entries of a tensor that are worked on at once.
PIECE = 1 << 18
#: What a forward pass depends on beside the weights, as far as the shapes do not show it.
_COMPUTED_WITH = (
    *("model_type", "hidden_act", "activation_function", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("head_dim", "rope_theta", "rope_parameters", "rope_scaling", "rms_norm_eps", "layer_norm_epsilon"),
    *("layer_norm_eps", "sliding_window", "tie_word_embeddings", "num_experts_per_tok"),
)
_BESIDE = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")
RECORD = "merge.json"
_NOT_COPIED = ("trainer_state.json", "adapter_config.json", RECORD)


@contextmanager
def whole_folder(to: Path, needed: int, record: Mapping[str, Any]) -> Iterator[Path]:
    """A hidden folder beside `to`, which gets its name when all went well and is removed otherwise.

    Args:
        to: must not exist yet.
        needed: bytes that will be written.
        record: how the content was made, kept beside it as merge.json.

    Raises:
        ModelError: `to` is there already, or too little space is left for it.
    """
    if to.exists():
        raise ModelError(f"{to}: exists already. Choose a new folder.")
    to.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(to.parent).free) < needed:
        raise ModelError(
            f"{to}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed. Free some, or choose another disk."
        )
    partial = to.with_name(f".{to.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of a merge that was killed
    partial.mkdir()
    try:
        yield partial
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (partial / RECORD).write_text(text, encoding="utf-8")
        os.rename(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_alike(models: Sequence[Model]) -> None:
    """Refuse models whose tensors, settings or vocabularies are not those of the first.

    Raises:
        ModelError: naming the first tensor, setting or token that differs, and both values.
    """
    first = models[0]
    names = set(first.checkpoint.stored)
    for model in models:
        if odd := [name for name in model.changes if name not in names]:
            raise ModelError(
                f"{model.label}: its adapter changes '{odd[0]}', which {first.label} does not store, or shares with "
                "another tensor. Give the models that it was trained on, or write the merge with --as adapter."
            )
    for other in _distinct(models)[1:]:
        for key in _COMPUTED_WITH:
            mine, its = first.checkpoint.settings.get(key), other.checkpoint.settings.get(key)
            if None not in (mine, its) and mine != its:
                raise ModelError(
                    f"{first.label} and {other.label}: {key} is {mine} and {its} in config.json; the same weights mean "
                    "something else. Give models that were trained from one base."
                )
        theirs = set(other.checkpoint.stored)
        for name in [*first.checkpoint.stored, *other.checkpoint.stored]:
            here = first.checkpoint.shape(name) if name in names else "not there"
            there = other.checkpoint.shape(name) if name in theirs else "not there"
            if here != there:
                raise ModelError(
                    f"'{name}' is {here} in {first.label} and {there} in {other.label}; merged are models with the "
                    "same tensors. Give models that were trained from one base."
                )
    _require_one_vocabulary(models)


def _distinct(models: Sequence[Model]) -> list[Model]:
    """The first model of every checkpoint."""
    return list({model.checkpoint.folder: model for model in reversed(models)}.values())[::-1]


def _require_one_vocabulary(models: Sequence[Model]) -> None:
    from transformers import AutoTokenizer

    seen: dict[bytes, str] = {}
    for model in _distinct(models):
        file = model.checkpoint.folder / "tokenizer.json"
        if file.is_file():
            seen.setdefault(file.read_bytes(), model.label)
    if len(seen) < 2:
        return
    places = {model.label: model.checkpoint.folder for model in models}
    require_same({label: AutoTokenizer.from_pretrained(places[label]) for label in seen.values()}, "merging")


def merge_checkpoints(
    recipe: Combining,
    models: Sequence[Model],
    base: Model | None,
    first: Model,
    to: Path,
    shard_size: int | str,
    record: Mapping[str, Any],
    progress: Progress = lambda n: None,
) -> int:
    """Write the merged model as a folder for transformers.

    In memory are pieces of `PIECE` entries (of at least one row of a tensor). Sums are done in float32 (float64 where a
    model is); tensors that are not floating-point are taken as they are.

    Args:
        models: those that take part, alike (`require_alike`).
        base: gives θ⁰, and the dtypes; else `first` gives them.
        first: whose settings and tokenizer are copied.
        to: must not exist yet.
        shard_size: most bytes of a file; a tensor that is larger has its own.
        record: how it was made, for merge.json.
        progress: called with the bytes that were just written.

    Returns:
        Bytes of the tensors.

    Raises:
        ModelError: a tensor that cannot be read, a folder that is there already, or too little space.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    like = (base or first).checkpoint
    sizes = {name: math.prod(like.shape(name)) * like.dtype(name).itemsize for name in like.stored}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    with whole_folder(to, sum(sizes.values()), record) as folder, _one_thread():
        _copy_settings(first.checkpoint, like, folder)
        for file, names in split.filename_to_tensors.items():
            _write_shard(recipe, models, base, like, names, folder / file)
            progress(sum(sizes[name] for name in names))
        if split.is_sharded:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return sum(sizes.values())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small pieces are bound by memory: more threads gain little, and on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_shard(
    recipe: Combining, models: Sequence[Model], base: Model | None, like: Checkpoint, names: Sequence[str], file: Path
) -> None:
    with Writer(file, {name: (like.dtype(name), like.shape(name)) for name in names}) as out:
        for name in out.order:
            for piece in merged_pieces(recipe, models, base, like, name):
                out.write(name, piece)


def merged_pieces(
    recipe: Combining,
    models: Sequence[Model],
    base: Model | None,
    like: Checkpoint,
    name: str,
    exactly: bool = False,
) -> Iterator[Tensor]:
    """One tensor of the merged model, row by row of pieces, in the dtype that it has in `like`; or, `exactly`, as wide
    as the sums were made."""
    shape, kind = like.shape(name), like.dtype(name)
    if 0 in shape:
        return
    height = max(1, PIECE // math.prod(shape[1:]))
    length = shape[0] if shape else 1
    spans = [slice(at, min(at + height, length)) for at in range(0, length, height)]
    same = {model.unchanged(name) for model in [*models, *([base] if base else [])]}
    if not kind.is_floating_point or same == {(like.folder, name)}:
        yield from (like.read(name, span) for span in spans)
        return
    taking_part = [*models, base] if base else models
    stored = {kind, *(model.checkpoint.dtype(name) for model in taking_part)}
    # an adapter's product is added before the sum, and must not be rounded there
    wide = recipe.computes_in({torch.float32, *stored} if any(name in m.changes for m in taking_part) else stored)

    def reader(model: Model) -> Callable[[slice], Tensor]:
        return lambda span: model.read(name, span, wide)

    pieces = Pieces(
        name, math.prod(shape), spans, [reader(model) for model in models], None if base is None else reader(base)
    )
    for _, piece in recipe.combine(pieces):
        yield piece if exactly else piece.to(kind)


def _copy_settings(first: Checkpoint, like: Checkpoint, folder: Path) -> None:
    """Configuration, tokenizer, template and code of the first model; the dtype is that of the tensors."""
    for file in sorted(first.folder.iterdir()):
        if file.suffix in _BESIDE and not file.name.endswith(".index.json") and file.name not in _NOT_COPIED:
            shutil.copyfile(file, folder / file.name)
    settings: dict[str, Any] = dict(first.settings)
    for key in ("dtype", "torch_dtype"):
        settings.pop(key, None)
    if kind := like.settings.get("dtype", like.settings.get("torch_dtype")):
        settings["dtype"] = kind
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
