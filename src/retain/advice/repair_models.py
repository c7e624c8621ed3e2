"""The two models of a repair: opened, held against each other, put together at a point, and written there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retain.advice.repair_moves import THRESHOLD, TOP, Candidate, Magnitude, groups_of
from retain.errors import ModelError
from retain.functional.intruders import Intruders, intruders
from retain.models.load import load_model, load_tokenizer
from retain.models.merge_adapters import merge_adapters
from retain.models.merge_checkpoints import PIECE, merge_checkpoints, merged_pieces, require_alike
from retain.models.merge_recipe import Recipe
from retain.models.merge_sources import Model, open_model
from retain.models.vocabulary import require_same
from retain.rundir import RunDirectory

Progress = Callable[[int], None]
SHARD = "2GB"
_BASE = Recipe("interpolate", (0.0,))


@dataclass
class Both:
    """A base and a fine-tune of it.

    Args:
        base, tuned: their tensors, on the disk.
        tokenizers: of the base and of the tuned model.
        live: a model of their kind, whose weights are those of the last point that was put in.
    """

    base: Model
    tuned: Model
    tokenizers: tuple[Any, Any]
    live: Any = None

    @cached_property
    def names(self) -> list[str]:
        """Tensors that the tuned model changed; the others are the same in both at every point."""
        return [name for name in self.base.checkpoint.stored if self._moved(name)]

    @cached_property
    def groups(self) -> dict[str, str]:
        """Tensor → group of layers, of those that were changed."""
        every = groups_of(self.base.checkpoint.stored)
        return {name: every[name] for name in self.names}

    @property
    def adapted(self) -> bool:
        """Whether the tuned model is adapters on the very checkpoint of the base."""
        same = self.tuned.checkpoint.folder == self.base.checkpoint.folder
        return bool(self.tuned.adapters) and not self.base.adapters and same

    def change(self) -> Iterator[Tensor]:
        """τ of all tensors, in pieces of float32."""
        for name in self.names:
            for rows in self._spans(name):
                start = self.base.read(name, rows, torch.float32)
                yield self.tuned.read(name, rows, torch.float32).sub_(start)

    def magnitude(self, density: float) -> Magnitude:
        """The move that keeps this share of all entries of τ."""
        entries = sum(math.prod(self.base.checkpoint.shape(name)) for name in self.names)
        return Magnitude.keeping(density, entries, self.change)

    def intruders(self, path: Path, progress: Progress = lambda n: None) -> dict[str, Intruders]:
        """Of every changed matrix in the layers, kept in `path`; lookup tables have no singular directions to speak of.

        Args:
            progress: called with the number of matrices just looked at.
        """
        if not path.is_file():
            tensors = {}
            for name in self.matrices:
                whole = slice(0, self.base.checkpoint.shape(name)[0])
                start, final = (m.read(name, whole, torch.float32) for m in (self.base, self.tuned))
                for part, tensor in intruders(start, final, TOP, THRESHOLD)._asdict().items():
                    tensors[f"{name}:{part}"] = tensor.contiguous()
                progress(1)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".part")
            save_file(tensors, partial)
            partial.rename(path)
        stored = load_file(path)
        parts = {n: [stored[f"{n}:{part}"] for part in Intruders._fields] for n in self.matrices}
        return {name: Intruders(*tensors) for name, tensors in parts.items() if len(tensors[2])}

    @property
    def matrices(self) -> list[str]:
        """Changed matrices inside the layers."""
        shape = self.base.checkpoint.shape
        return [n for n in self.names if len(shape(n)) == 2 and self.groups[n] != "embeddings"]

    @torch.no_grad()
    def put(self, candidate: Candidate | None) -> Any:
        """The live model with the weights of a candidate, those of the base for None.

        Weights are rounded as they would be written (`write`).
        """
        live = self.live
        weights = live.state_dict()
        tuned, move = (self._of(candidate), candidate.move) if candidate else (self.tuned, _BASE)
        exactly = candidate is None or (candidate.scales and self.adapted)
        for name in self.base.checkpoint.stored:
            pieces = merged_pieces(move, [tuned], self.base, self.base.checkpoint, name, exactly)
            for rows, piece in zip(self._spans(name), pieces):
                target = weights[name] if weights[name].ndim else weights[name].reshape(1)
                target[rows].copy_(piece.reshape(target[rows].shape))
        return live

    def write(self, candidate: Candidate, to: Path, record: dict[str, Any]) -> tuple[str, float]:
        """Write a candidate as a folder that transformers, or PEFT, loads.

        An adapter stays one where all that is done to it is a scaling of its products; else a model is written, in the
        dtypes of the base.

        Returns:
            "adapter" or "model", and the share of the squared norm of the change that it holds.
        """
        tuned = self._of(candidate)
        if self.adapted and candidate.scales and candidate.folder is None:
            move: Any = candidate.move  # one that scales is for adapters, too
            kept = merge_adapters(move, [tuned], self.base.checkpoint, to, None, record)
            self.tokenizers[1].save_pretrained(to)
            return "adapter", kept.share
        merge_checkpoints(candidate.move, [tuned], self.base, tuned, to, SHARD, record)
        self.tokenizers[1].save_pretrained(to)
        return "model", 1.0

    def _of(self, candidate: Candidate) -> Model:
        if candidate.folder is None:
            return self.tuned
        return replace(self.tuned, adapters=(*self.tuned.adapters, Path(candidate.folder)))

    def _moved(self, name: str) -> bool:
        if self.base.unchanged(name) is not None and self.base.unchanged(name) == self.tuned.unchanged(name):
            return False
        wide = torch.promote_types(torch.float32, self.base.checkpoint.dtype(name))
        return any(
            not torch.equal(self.base.read(name, rows, wide), self.tuned.read(name, rows, wide))
            for rows in self._spans(name)
        )

    def _spans(self, name: str) -> list[slice]:
        """Those of `merged_pieces`."""
        shape = self.base.checkpoint.shape(name)
        height = max(1, PIECE // max(1, math.prod(shape[1:])))
        length = shape[0] if shape else 1
        return [slice(at, min(at + height, length)) for at in range(0, length, height)]


def open_both(base: str, tuned: str) -> Both:
    """Open a base and its fine-tune, and refuse what is no such pair.

    Args:
        base: `starter`, a folder of a model or an adapter, or a hub id.
        tuned: the same, or a run after its last task.

    Raises:
        ModelError: one that cannot be opened, models that are not alike, or that are the same.
        RunError: a run that is not finished.
    """
    words = (tokenizer_of(base), tokenizer_of(tuned))
    require_same({base: words[0], tuned: words[1]}, "a repair")
    both = Both(open_model(base), open_model(tuned), words)
    require_alike([both.base, both.tuned])
    if not both.names:
        raise ModelError(f"--tuned: {tuned} has the weights of {base}, so that nothing was learned. Give a fine-tune.")
    return both


def load_live(both: Both, base: str, device: str) -> None:
    """Load the model into which points are put.

    Raises:
        ModelError: transformers gives its tensors other names or shapes than its folder.
    """
    from retain.pipeline import load_run

    run = (Path(base) / "run.yaml").is_file()
    both.live = (load_run(base) if run else load_model(base, tokenizer=False))[0].to(device)
    weights = both.live.state_dict()
    for name in both.base.checkpoint.stored:
        if name not in weights or tuple(weights[name].shape) != both.base.checkpoint.shape(name):
            raise ModelError(
                f"{base}: transformers holds '{name}' under another name or shape than its folder, so that points "
                "between two models cannot be put in. Open the model with transformers and write it with "
                "save_pretrained."
            )


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model, of an adapter's base, or of a run.

    Raises:
        ModelError: there is none.
    """
    from retain.models.load import adapter_base

    place = Path(name)
    if (place / "run.yaml").is_file():
        config = RunDirectory(name).read_config()
        return tokenizer_of(config.model.name)
    if (place / "adapter_config.json").is_file() and not (place / "tokenizer_config.json").is_file():
        return tokenizer_of(adapter_base(place / "adapter_config.json"))
    return load_tokenizer(name)


def weights_stamp(models: Sequence[Model]) -> list[str]:
    """What the files of models are: name, size and time of change of each."""
    files = [
        file
        for model in models
        for folder in (model.checkpoint.folder, *model.adapters)
        for file in sorted(folder.glob("*.safetensors"))
    ]
    return [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
