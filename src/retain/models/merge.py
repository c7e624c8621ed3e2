"""Merging models into one: what is asked for, what comes out, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from retain.errors import ConfigError, ModelError
from retain.models.load import adapter_base
from retain.models.merge_adapters import Kept, merge_adapters
from retain.models.merge_checkpoints import Progress, merge_checkpoints, require_alike
from retain.models.merge_recipe import ON_BASE, recipe
from retain.models.merge_sources import Model, open_model
from retain.models.shards import Checkpoint

#: (what is counted, how much of it) → context of a progress bar.
Watched = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Merged:
    """What was written.

    Args:
        folder: of the result.
        form: `model` or `adapter`.
        base: the model that an adapter, or a change, stands on; "" without one.
        size: bytes of the tensors of a model; 0 for an adapter.
        kept: of an adapter's change.
    """

    folder: Path
    form: str
    base: str
    size: int = 0
    kept: Kept | None = None


def merge(
    names: Sequence[str],
    to: str | Path,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: str | None = None,
    density: float | None = None,
    scale: float | None = None,
    seed: int = 0,
    form: str | None = None,
    rank: int | None = None,
    shard_size: int | str = "2GB",
    watched: Watched = lambda what, total: nullcontext(lambda n: None),
) -> Merged:
    """Merge models, or adapters, and write the result where it did not exist before.

    Adapters of one base become one adapter (`form="adapter"`, the default for them), or are added to the base and
    written as a model. Everything else becomes a model.

    Args:
        names: `starter`, folders of models or LoRA adapters, directories of finished runs, hub ids.
        to: folder to write; it appears when it is whole.
        method, weights, density, scale, seed: as in `retain.models.merge_recipe.recipe`.
        base: θ⁰; that of the adapters by default.
        form: `model` or `adapter`.
        rank: of an adapter; all ranks together by default.
        shard_size: most bytes of a model's file, such as "2GB".

    Raises:
        ConfigError: settings that are impossible or do nothing.
        ModelError: models that cannot be opened or are not alike; the tensor and both shapes are named.
        RunError: a run that is not finished.
    """
    if form not in (None, "adapter", "model"):
        raise ConfigError(f"--as: {form} given; allowed: adapter, model.")
    if Path(to).exists():
        raise ModelError(f"{to}: exists already. Choose a new folder.")
    models = [open_model(name) for name in names]
    start, ground = _ground(models, base)
    settings, used = recipe(method, len(models), weights, density, scale, seed, start is not None)
    if form == "adapter" and ground is None:
        raise ConfigError(
            "--as adapter: the models are not all adapters of one base. Give adapters of one, or leave --as out."
        )
    taken = [models[i] for i in used]
    record = {
        "method": method,
        "models": [model.label for model in models],
        "weights": list(weights) if weights is not None else None,
        "settings": {"weights": settings.weights, "density": settings.density, "scale": settings.scale, "seed": seed},
        "base": start.label if start else None,
    }
    if ground is not None and form != "model":
        require_alike([Model(str(ground.folder), ground), *models])
        matrices = len({name for model in taken for name in model.changes})
        with watched("matrices", matrices) as progress:
            kept = merge_adapters(settings, taken, ground, Path(to), rank, record, progress)
        return Merged(Path(to), "adapter", adapter_base(Path(to) / "adapter_config.json"), 0, kept)
    if rank is not None:
        raise ConfigError("--rank: does nothing for a whole model. Leave it out, or give adapters of one base.")
    needs = start if method in ON_BASE or method == "slerp" else None
    require_alike([*([start] if start else []), *models])
    like = (needs or models[0]).checkpoint
    total = sum(math.prod(like.shape(name)) * like.dtype(name).itemsize for name in like.stored)
    with watched("bytes", total) as progress:
        size = merge_checkpoints(settings, taken, needs, models[0], Path(to), shard_size, record, progress)
    return Merged(Path(to), "model", start.label if start else "", size)


def _ground(models: Sequence[Model], base: str | None) -> tuple[Model | None, Checkpoint | None]:
    """(θ⁰, the checkpoint that all models are adapters of); None where there is none."""
    folders = {model.checkpoint.folder for model in models}
    one = models[0].checkpoint if models and len(folders) == 1 and all(model.adapters for model in models) else None
    if base is None:
        return (None, None) if one is None else (Model(str(one.folder), one), one)
    start = open_model(base)
    return start, one if one is not None and not start.adapters and start.checkpoint.folder == one.folder else None
