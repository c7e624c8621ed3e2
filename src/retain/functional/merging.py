"""Moving a trained model back towards where it started (WiSE-FT, Wortsman 2022, arXiv:2109.01903)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retain.errors import ConfigError, ModelError


@torch.no_grad()
def interpolate(
    start: Mapping[str, Tensor], final: Mapping[str, Tensor], share: float, *, in_place: bool = False
) -> dict[str, Tensor]:
    """θ⁰ + α (θ − θ⁰) for every tensor.

    Sums are done in at least float32. At α = 0 and α = 1 the tensors of that end come back with their bits
    unchanged (converted to the dtype of `final` if the ends differ in dtype). Tensors that are not
    floating-point are taken from `final` (from `start` at α = 0).

    Args:
        start: θ⁰ by name.
        final: θ by name, same names and shapes.
        share: α in [0, 1]; 0 is `start`, 1 is `final`.
        in_place: write into the tensors of `final`. A tensor that is there under two names (tied embeddings)
            is written once.

    Returns:
        Tensors by name, in the dtypes of `final`; those of `final` themselves when `in_place`.

    Raises:
        ConfigError: share outside [0, 1].
        ModelError: different names or shapes.
    """
    _check_share(share)
    if start.keys() != final.keys():
        odd = sorted(start.keys() ^ final.keys())
        raise ModelError(
            f"interpolate: {len(odd)} weights are in one model only (first: '{odd[0]}'); both must have "
            "the same names. Merge or unload adapters first."
        )
    merged: dict[str, Tensor] = {}
    done: set[tuple] = set()
    for name, new in final.items():
        old = start[name]
        if old.shape != new.shape:
            raise ModelError(
                f"interpolate: '{name}' is {tuple(old.shape)} at the start and {tuple(new.shape)} at the "
                "end; shapes must be equal. Resize the embeddings of the start first."
            )
        if not in_place:
            merged[name] = _between(old, new, share)
            continue
        merged[name] = new
        place = (new.device, new.data_ptr(), new.storage_offset(), new.shape, new.stride())
        if share != 1 and (new.numel() == 0 or place not in done):
            new.copy_(_between(old, new, share))
            done.add(place)
    return merged


@torch.no_grad()
def scale_low_rank(b: Tensor, share: float) -> Tensor:
    """B of a LoRA adapter [m, r] such that the adapter gives W⁰ + α s BA, i.e. α·B.

    For an adapter on a frozen base this *is* `interpolate`, exactly: only B is scaled. Scaling A as well, or
    taking weighted means of A and of B separately, gives α² or cross terms.

    Raises:
        ConfigError: share outside [0, 1].
    """
    _check_share(share)
    if share == 1:
        return b.clone()
    wide = b.dtype if b.dtype == torch.float64 else torch.float32
    return (b.to(wide) * share).to(b.dtype)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"interpolate.share: {share} given; allowed: 0 (start) to 1 (final).")


def _between(old: Tensor, new: Tensor, share: float) -> Tensor:
    if share == 0:
        return old.to(device=new.device, dtype=new.dtype, copy=True)
    if share == 1 or not new.is_floating_point():
        return new.clone()
    wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    return torch.lerp(old.to(device=new.device, dtype=wide), new.to(wide), share).to(new.dtype)
