"""Merging LoRA adapters into one: the sum of their changes, kept exactly where it is a sum, else by its largest part.

ΔW = s BA is what an adapter does; A and B alone are not defined by it (any invertible r × r matrix between them gives
the same ΔW), so that averages of A and of B hold cross terms. A sum Σ cᵢ sᵢ BᵢAᵢ is one product again, exactly: the
factors side by side, with rank Σ rᵢ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from retain.errors import ConfigError, ModelError
from retain.models.load import adapter_base, resolve
from retain.models.merge_checkpoints import PIECE, Progress, whole_folder
from retain.models.merge_recipe import Pieces, Sharing
from retain.models.merge_sources import Factors, Model
from retain.models.shards import Checkpoint

#: Up to this smaller side a matrix is decomposed exactly, beyond it by a randomised method.
_EXACT = 1024


@dataclass(frozen=True)
class Kept:
    """What an adapter holds of the change that was asked for.

    Args:
        rank: the largest rank of a matrix.
        share: of the squared norm, over all matrices; 1 where nothing was cut.
        least: the same of the matrix that lost most.
        worst: its name.
    """

    rank: int
    share: float = 1.0
    least: float = 1.0
    worst: str = ""


@dataclass(frozen=True)
class _Product:
    """A change of one matrix: scaling · b a, in PEFT's orientation."""

    a: Tensor
    b: Tensor
    scaling: float
    whole: float = 0.0  # squared norm of what it stands for
    kept: float = 0.0

    @property
    def share(self) -> float:
        return self.kept / self.whole if self.whole > 0 else 1.0


def merge_adapters(
    recipe: Sharing,
    models: Sequence[Model],
    checkpoint: Checkpoint,
    to: Path,
    rank: int | None,
    record: Mapping[str, Any],
    progress: Progress = lambda n: None,
) -> Kept:
    """Write one adapter that does what the recipe makes of several on one base.

    Args:
        models: those that take part, all adapters of `checkpoint`. A matrix that only some of them change is
            unchanged in the others.
        rank: largest rank of the result. By default all ranks together; that is exact for sums, and cuts what
            dropping entries one by one (TIES, DARE) has made of the matrices.
        record: how it was made, for merge.json.
        progress: called with the number of matrices just merged.

    Raises:
        ConfigError: a rank below 1.
        ModelError: nothing is left, or a folder that is there already.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: {rank} given; allowed: 1 or more.")
    names = list(dict.fromkeys(name for model in models for name in model.changes))
    if not names:
        raise ModelError("merge: all weights are zero, so that no adapter is left. Give one that is not.")
    products: dict[str, _Product] = {}
    for name in names:
        products[name] = _merged(recipe, [model.changes.get(name, []) for model in models], name, rank)
        progress(1)
    keys = {name: _keys(models, name) for name in names}
    with whole_folder(to, sum(p.a.nbytes + p.b.nbytes for p in products.values()), record) as folder:
        tensors = {}
        for name, product in products.items():
            tensors[keys[name][0]], tensors[keys[name][1]] = product.a.contiguous(), product.b.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _settings(models, checkpoint, products).save_pretrained(str(folder))
    worst = min(products, key=lambda name: products[name].share)
    kept, whole = (sum(getattr(product, part) for product in products.values()) for part in ("kept", "whole"))
    largest = max(len(product.a) for product in products.values())
    return Kept(largest, kept / whole if whole > 0 else 1.0, products[worst].share, worst)


def _keys(models: Sequence[Model], name: str) -> tuple[str, str]:
    return next(model.changes[name][0].keys for model in models if name in model.changes)


def _merged(recipe: Sharing, changes: Sequence[list[Factors]], name: str, rank: int | None) -> _Product:
    """The merged change of one matrix.

    Args:
        changes: of every model; several where adapters stand on each other, none where it leaves the matrix alone.
    """
    products = _products(changes) if recipe.needs_angles() else None
    shares = recipe.shares(products)
    if shares is None:
        return _cut_matrix(recipe, changes, name, rank or sum(len(f.a) for own in changes for f in own))
    parts = [(share, factors) for share, own in zip(shares, changes) for factors in own]
    first = parts[0][1]
    a = torch.cat([factors.a for _, factors in parts])
    b = torch.cat([_times(factors.b, share * factors.scaling / first.scaling) for share, factors in parts], dim=1)
    if rank is not None and len(a) > rank:
        return _cut_product(a, b, first.scaling, rank)
    norm = 1.0 if rank is None else float(_products([[replace(first, a=a, b=b)]]))
    return _Product(a, b, first.scaling, norm, norm)


def _times(b: Tensor, factor: float) -> Tensor:
    return b if factor == 1 else (b.float() * factor).to(b.dtype)


def _products(changes: Sequence[list[Factors]]) -> Tensor:
    """[n, n] inner products of the changes, ⟨sBA, tDC⟩ = st Σ (BᵀD ∘ ACᵀ), without writing them out."""

    def inner(one: Factors, other: Factors) -> float:
        across = (one.b.double().T @ other.b.double()) * (one.a.double() @ other.a.double().T)
        return one.scaling * other.scaling * float(across.sum())

    rows = [[sum(inner(f, g) for f in mine for g in its) for its in changes] for mine in changes]
    return torch.tensor(rows, dtype=torch.float64)


def _cut_product(a: Tensor, b: Tensor, scaling: float, rank: int) -> _Product:
    """The best approximation of a product by one of smaller rank, from its factors alone."""
    left, upper = torch.linalg.qr(scaling * b.double())
    right, lower = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    return _of_svd(left @ u, s, vh @ right.T, rank, float(s.square().sum()), a.dtype)


def _cut_matrix(recipe: Sharing, changes: Sequence[list[Factors]], name: str, rank: int) -> _Product:
    """A change that is no sum of products: written out, merged entry by entry, and cut to a rank."""
    some = next(factors for own in changes for factors in own)
    whole = [_dense(own, some.shape) for own in changes]
    height = max(1, PIECE // some.shape[1])

    def reads(matrix: Tensor) -> Callable[[slice], Tensor]:
        return lambda rows: matrix[rows].clone()

    spans = [slice(at, min(at + height, some.shape[0])) for at in range(0, some.shape[0], height)]
    pieces = Pieces(name, whole[0].numel(), spans, [reads(matrix) for matrix in whole])
    merged = torch.cat([piece for _, piece in recipe.combine(pieces)])
    merged = merged.T if some.flipped else merged
    norm = float(merged.double().square().sum())
    rank = min(rank, *merged.shape)
    if min(merged.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            u, s, v = torch.svd_lowrank(merged, q=min(rank + 16, *merged.shape), niter=4)
        vh = v.T
    return _of_svd(u, s, vh, rank, norm, some.a.dtype)


def _dense(own: Sequence[Factors], shape: tuple[int, ...]) -> Tensor:
    total = torch.zeros(shape)
    for factors in own:
        total += factors.rows(slice(None), torch.float32)
    return total


def _of_svd(u: Tensor, s: Tensor, vh: Tensor, rank: int, norm: float, kind: torch.dtype) -> _Product:
    """The largest `rank` directions of u s vh, half of each size in either factor."""
    root = s[:rank].sqrt()
    a, b = (root[:, None] * vh[:rank]).to(kind), (u[:, :rank] * root).to(kind)
    return _Product(a, b, 1.0, norm, min(norm, float(s[:rank].double().square().sum())))


def _settings(models: Sequence[Model], checkpoint: Checkpoint, products: dict[str, _Product]) -> Any:
    """The first adapter's configuration with ranks, scalings and targets of the merged one."""
    from peft import PeftConfig

    folder = models[0].adapters[0]
    config: Any = PeftConfig.from_pretrained(str(folder))
    base = adapter_base(folder / "adapter_config.json")
    if Path(resolve(base)).resolve() != checkpoint.folder and not _is_snapshot(base, checkpoint.folder):
        base = str(checkpoint.folder)
    modules = {name.removesuffix(".weight"): product for name, product in products.items()}
    ranks = {module: len(product.a) for module, product in modules.items()}
    alphas = {module: _whole(product.scaling * len(product.a)) for module, product in modules.items()}
    targets = [PeftConfig.from_pretrained(str(own)).target_modules for model in models for own in model.adapters]
    same = all(isinstance(t, set | list) and set(t) == set(targets[0]) for t in targets)
    everywhere = all(set(model.changes) == set(products) for model in models)
    config.base_model_name_or_path = base
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {module: rank for module, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {module: alpha for module, alpha in alphas.items() if alpha != config.lora_alpha}
    config.target_modules = set(targets[0]) if same and everywhere else set(modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.use_rslora, config.init_lora_weights, config.inference_mode, config.bias = False, True, True, "none"
    return config


def _whole(number: float) -> float | int:
    return round(number) if abs(number - round(number)) < 1e-9 else number


def _is_snapshot(name: str, folder: Path) -> bool:
    """Whether a folder of the hub's cache holds the model of this name."""
    return f"models--{name.replace('/', '--')}" in folder.parts
