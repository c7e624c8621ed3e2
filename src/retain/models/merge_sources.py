"""What is merged: checkpoints in safetensors, LoRA adapters as changes of their base's tensors, and finished runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from retain.errors import ModelError, RunError
from retain.models import hub
from retain.models.load import adapter_base, resolve
from retain.models.shards import Checkpoint
from retain.rundir import RunDirectory, stage_name

#: Initialisations that leave the base as it is; others move a part of it into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
#: Settings of PEFT with which a LoRA adapter is no plain product.
_NOT_PLAIN = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config", "velora_config"),
)


@dataclass(frozen=True)
class Factors:
    """A low-rank change of one matrix, as PEFT keeps it.

    Args:
        a: [r, in]; of an embedding [r, tokens].
        b: [out, r]; of an embedding [width, r].
        scaling: of the product.
        keys: names of both in the adapter's file.
        flipped: the base keeps the matrix as [in, out].
    """

    a: Tensor
    b: Tensor
    scaling: float
    keys: tuple[str, str]
    flipped: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base's tensor."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.flipped else shape

    def rows(self, span: slice, kind: torch.dtype) -> Tensor:
        """Rows of scaling · BA, in the orientation of the base's tensor."""
        left, right = (self.a.T, self.b.T) if self.flipped else (self.b, self.a)
        return (left[span].to(kind) @ right.to(kind)).mul_(self.scaling)


@dataclass(frozen=True)
class Model:
    """A checkpoint with the adapters that stand on it.

    Args:
        label: as the user gave it.
        checkpoint: the weights under the adapters.
        adapters: folders, in the order in which they are put on.
    """

    label: str
    checkpoint: Checkpoint
    adapters: tuple[Path, ...] = ()

    @cached_property
    def changes(self) -> dict[str, list[Factors]]:
        """Tensor name → what the adapters add to it."""
        found: dict[str, list[Factors]] = {}
        for folder in self.adapters:
            for name, factors in read_adapter(folder, self.checkpoint).items():
                shape = self.checkpoint.shape(name) if name in self.checkpoint.files else factors.shape
                if factors.shape != shape == factors.shape[::-1]:  # PEFT writes this setting once for all layers
                    factors = replace(factors, flipped=not factors.flipped)
                if factors.shape != shape:
                    raise ModelError(
                        f"{folder}: changes '{name}' as {factors.shape}, which is {shape} in {self.checkpoint.folder}. "
                        "Give the adapter with the base it was trained on."
                    )
                found.setdefault(name, []).append(factors)
        return found

    def unchanged(self, name: str) -> tuple[Path, str] | None:
        """Which stored tensor this is; None where an adapter changes it."""
        return None if name in self.changes else (self.checkpoint.folder, name)

    def read(self, name: str, rows: slice, kind: torch.dtype) -> Tensor:
        """Rows of a tensor, adapters added, as a new one of a floating-point dtype; a scalar is one row."""
        piece = self.checkpoint.read(name, rows)
        piece = piece.reshape(1) if piece.ndim == 0 else piece
        piece = piece if piece.dtype == kind else piece.to(kind)
        for factors in self.changes.get(name, ()):
            piece.add_(factors.rows(rows, kind))
        return piece


def open_model(name: str) -> Model:
    """A model to merge: `starter`, a folder with a model or an adapter, the directory of a finished run, or a hub id.

    Raises:
        ModelError: it cannot be opened, or is no plain checkpoint or LoRA adapter.
        RunError: a run that is not finished.
    """
    place = Path(name)
    if (place / "run.yaml").is_file():
        return _of_run(name)
    if (place / "adapter_config.json").is_file():
        try:
            base = open_model(adapter_base(place / "adapter_config.json"))
        except ModelError as error:
            raise ModelError(f"{place / 'adapter_config.json'}, base_model_name_or_path: {error}") from error
        return Model(name, base.checkpoint, (*base.adapters, place))
    return Model(name, Checkpoint(_folder(name)))


def _folder(name: str, revision: str | None = None) -> Path:
    where = resolve(name)
    hub.require(where, revision)
    if Path(where).is_dir():
        folder = Path(where).resolve()
        if (folder / "bottleneck").is_dir():
            raise ModelError(f"{name}: has bottleneck adapters, which cannot be merged. Give a model without them.")
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    return Path(snapshot_download(where, revision=revision, allow_patterns=wanted)).resolve()


def _of_run(name: str) -> Model:
    """A run's model after its last task, as `load_run` puts it together, but not yet added up."""
    place = RunDirectory(name)
    config = place.read_config()
    stages = [stage_name(i, task) for i, task in enumerate(config.task_names, 1)]
    for stage in stages:
        if place.done(stage) is None:
            raise RunError(f"{name}: stage '{stage}' is not finished. Run the same command again to go on.")
    if config.model.quantize != "none":
        raise ModelError(
            f"{name}: its adapter learned on a quantised base. Give the adapter, {place.task(stages[-1]) / 'adapter'}, "
            f"to merge it as one of the base in full precision, or `retain export {name} --to FOLDER` first."
        )
    tasks = [place.task(stage) for stage in stages]
    if any((task / "bottleneck").is_dir() for task in tasks):
        raise ModelError(f"{name}: has bottleneck adapters, which cannot be merged. Give a run without them.")
    whole = [i for i, task in enumerate(tasks) if (task / "model").is_dir()]
    if whole:
        base = Model(name, Checkpoint((tasks[whole[-1]] / "model").resolve()))
    elif (Path(config.model.name) / "adapter_config.json").is_file():
        base = open_model(config.model.name)
    else:
        base = Model(name, Checkpoint(_folder(config.model.name, config.model.revision)))
    later = tasks[whole[-1] :] if whole else tasks
    adapters = [task / "adapter" for task in later if (task / "adapter").is_dir()]
    return Model(name, base.checkpoint, (*base.adapters, *adapters))


def read_adapter(folder: Path, base: Checkpoint) -> dict[str, Factors]:
    """The products of a LoRA adapter, by the name of the base's tensor that they change.

    Raises:
        ModelError: another kind of adapter, one that is no plain product, or a file that is damaged.
    """
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: its adapter_config.json cannot be read ({error}). Copy it again.") from error
    advice = "Merge it into its base first: `retain export` for a run, merge_and_unload of PEFT for others."
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ModelError(f"{folder}: a {config.peft_type} adapter; merged are LoRA adapters. {advice}")
    odd = [name for name in _NOT_PLAIN if getattr(config, name, None)]
    if config.init_lora_weights not in _PLAIN_STARTS:
        odd.append(f"init_lora_weights: {config.init_lora_weights}")
    if odd:
        raise ModelError(f"{folder}: {odd[0]} makes it more than a product added to the base. {advice}")
    tensors = _adapter_tensors(folder)
    found: dict[str, Factors] = {}
    for key, a in tensors.items():
        module, kind, rest = _parts(key)
        if key.endswith(".base_layer.weight"):  # PEFT keeps embeddings beside their factors, in case they were resized
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if name in base.files and a.dtype == base.dtype(name) and torch.equal(a, base.read(name)):
                continue
        partner = f"{module}{'.lora_embedding_B' if 'embedding' in kind else '.lora_B'}{rest}"
        if kind in (".lora_B", ".lora_embedding_B") and key.replace("_B", "_A") in tensors and a.ndim == 2:
            continue
        if kind not in (".lora_A", ".lora_embedding_A") or partner not in tensors or a.ndim != 2:
            raise ModelError(f"{folder}: '{key}' is no part of a product of two matrices. {advice}")
        name = module.removeprefix("base_model.model.")
        rank = len(a)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        flipped = bool(config.fan_in_fan_out) or "embedding" in kind
        found[f"{name}.weight"] = Factors(a, tensors[partner], float(scaling), (key, partner), flipped)
    if not found:
        raise ModelError(f"{folder}: the adapter has no tensors. Copy it again.")
    return found


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read ({error}). Copy the adapter again, in safetensors.") from error


def _parts(key: str) -> tuple[str, str, str]:
    """(module, kind of factor, what follows) of a name in an adapter's file; kind "" where it is none."""
    for kind in (".lora_embedding_A", ".lora_embedding_B", ".lora_A", ".lora_B"):
        module, found, rest = key.rpartition(kind)
        if found and rest in ("", ".weight"):
            return module, kind, rest
    return key, "", ""
