"""Hidden states of an earlier model kept in a few bits, and how far another model's are from them.

Per dimension μ and σ are taken over all positions. Every entry of a state is then low (≤ μ − σ), high (≥ μ + σ) or
neither, which is 2 bits, and leaving its range costs the distance to it (GeRe, arXiv:2508.04676):

    low: relu(z + 1)      high: relu(1 − z)      neither: relu(z − 1) + relu(−1 − z)      z = (h − μ) / σ

Distances are in units of σ here, so that a weight on them means the same on every model. For a plain squared distance
the entries themselves are kept, rounded to 2^bits even steps between the least and the largest value of a dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retain.errors import ConfigError

BITS = (2, 4, 8, 16)


class Moments:
    """μ, σ, least and largest value per dimension [H] of states that come in parts [N, H]; in float64, one pass."""

    mean: Tensor
    low: Tensor
    high: Tensor
    _squares: Tensor  # Σ (h − μ)²

    def __init__(self) -> None:
        self.count = 0

    def add(self, states: Tensor) -> None:
        """Take in states [N, H]."""
        if not len(states):
            return
        wide = states.detach().double()
        mean, squares = wide.mean(0), (wide - wide.mean(0)).square().sum(0)
        low, high = wide.amin(0), wide.amax(0)
        if self.count:
            total = self.count + len(wide)
            gap = mean - self.mean
            squares = self._squares + squares + gap.square() * (self.count * len(wide) / total)
            mean = self.mean + gap * (len(wide) / total)
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.count += len(wide)
        self.mean, self._squares, self.low, self.high = mean, squares, low, high

    @property
    def deviation(self) -> Tensor:
        """σ [H], of the whole population; a dimension that hardly varies gets a thousandth of the mean σ."""
        sigma = (self._squares / self.count).sqrt()
        return sigma.clamp_min(max(float(sigma.mean()) * 1e-3, torch.finfo(torch.float32).tiny))


def ranges(states: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Where every entry of states [N, H] lies: 0 low, 1 neither, 2 high; uint8 [N, H]."""
    z = _standard(states, mean, deviation)
    return (z > -1).to(torch.uint8) + (z >= 1).to(torch.uint8)


def margin(states: Tensor, codes: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """What states pay for leaving their ranges: (sum, number of entries that pay), both scalars.

    Their quotient is the loss of GeRe; averaged over all entries it would be orders of magnitude smaller, and would
    shrink as the states come home. Exactly 0 for the states the codes were made of.

    Args:
        states: [N, H], with gradient.
        codes: [N, H] from `ranges`.
        mean, deviation: μ and σ [H].
    """
    z = _standard(states, mean, deviation)
    places = codes.long()
    bottom = z.new_tensor([-torch.inf, -1.0, 1.0])[places]
    top = z.new_tensor([-1.0, 1.0, torch.inf])[places]
    paid = torch.relu(bottom - z) + torch.relu(z - top)
    return paid.sum(), (paid > 0).sum()


def squared(states: Tensor, kept: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Σ ((h − h⁰)/σ)² and the number of entries, both scalars; `states` and `kept` [N, H]."""
    gap = (_wide(states) - kept.to(states.device)) / deviation.to(_wide(states).dtype)
    return gap.square().sum(), torch.tensor(gap.numel(), device=gap.device)


def quantise(states: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Steps 0 … 2^bits − 1 of every entry between `low` and `high` [H]; int32 [N, H], off by half a step at most."""
    step = (high - low) / (2**bits - 1)
    place = torch.where(step > 0, (states.double() - low) / step, 0)
    return place.round().clamp(0, 2**bits - 1).int()


def dequantise(steps: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The values of steps [N, H], float32."""
    return (low + steps * ((high - low) / (2**bits - 1))).float()


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers [N, H] below 2^bits without unused bits: uint8 [N, ⌈H · bits / 8⌉], or int16 [N, H] for 16.

    Raises:
        ConfigError: `bits` is none of `BITS`.
    """
    if bits not in BITS:
        raise ConfigError(f"stored_states.bits: {bits} given; allowed: {', '.join(map(str, BITS))}.")
    if bits == 16:
        return codes.int().to(torch.int16)  # wraps; `unpack` takes it back
    per = 8 // bits
    whole = torch.nn.functional.pad(codes.int(), (0, -codes.shape[1] % per)).view(len(codes), -1, per)
    shifts = torch.arange(per, device=codes.device) * bits
    return (whole << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """What `pack` was given: int32 [N, width]."""
    if bits == 16:
        return packed.int() & 0xFFFF
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    return ((packed.int()[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :width]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _standard(states: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    wide = _wide(states)
    return (wide - mean.to(wide)) / deviation.to(wide)
