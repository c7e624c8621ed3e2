"""A quadratic pull of a model towards anchor weights, whatever the weights are made of.

Ordinary weights are pulled one by one. LoRA factors are pulled as the product ΔW = s·BA, because A and B alone
have no fixed meaning (any invertible r×r matrix between them leaves ΔW as it is), and A has no gradient at the
start, where B = 0. Works on shards: the dense part is element-wise; LoRA factors, being small, are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from retain.functional import penalties
from retain.models import params
from retain.models.params import Tensors


def product_keys(name: str) -> tuple[str, str]:
    """Names of the row and column importance of an adapted layer."""
    return f"{name}.rows", f"{name}.columns"


class Pull:
    """½ · strength · Σ F (θ − θ*)² over the trainable weights of a model.

    Args:
        model: wrapped or not.
        anchor: θ* by parameter name (`params.snapshot`).
        importance: F by parameter name; for an adapted layer `<layer>.rows` [out] and `<layer>.columns` [in].
            None stands for 1 everywhere. Parameters without an entry are not pulled.
        factors: on the strength, by name of parameter or adapted layer; 1 where not named, 0 is not pulled.
    """

    def __init__(
        self,
        model: Any,
        anchor: Tensors,
        importance: Tensors | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        factor_of = {} if factors is None else {name: f for name, f in factors.items() if f != 1}
        names = {id(p): name for name, p in params.trainable(model).items()}
        self.dense: list[torch.nn.Parameter] = []
        self._anchors: list[torch.Tensor] = []
        self._importance: list[torch.Tensor | None] = []
        self._factors_dense: list[float] = []
        self._factors_pairs: list[float] = []
        for name, parameter in params.outside_lora(model).items():
            if (importance is None or name in importance) and factor_of.get(name, 1.0) != 0:
                self.dense.append(parameter)
                self._anchors.append(params.aligned(anchor[name], parameter))
                weights = None if importance is None else params.aligned(importance[name], parameter)
                self._importance.append(weights)
                self._factors_dense.append(factor_of.get(name, 1.0))
        self.pairs: list[params.LoraPair] = []
        self._products: list[dict[str, torch.Tensor | None]] = []
        for name, pair in params.lora_pairs(model).items():
            rows, columns = product_keys(name)
            if (importance is not None and rows not in importance) or factor_of.get(name, 1.0) == 0:
                continue
            self._factors_pairs.append(factor_of.get(name, 1.0))
            b0, a0 = anchor[names[id(pair.B)]], anchor[names[id(pair.A)]]
            moved = bool((b0 != 0).any())
            self.pairs.append(pair)
            self._products.append(
                {
                    "b0": b0.to(pair.B.device) if moved else None,
                    "a0": a0.to(pair.A.device) if moved else None,
                    "rows": None if importance is None else importance[rows].to(pair.B.device),
                    "columns": None if importance is None else importance[columns].to(pair.A.device),
                }
            )

    @property
    def protected(self) -> int:
        """How many weights are pulled; for LoRA those of the adapted base layers."""
        return sum(p.numel() for p in self.dense) + sum(p.B.shape[0] * p.A.shape[1] for p in self.pairs)

    def value(self, strength: float) -> float:
        """The penalty, for the log; on shards, of this rank's part."""
        dense = penalties.quadratic_value(
            params.locals_of(p.detach() for p in self.dense), *self._local(), self._strengths(strength)
        )
        low = penalties.low_rank_value(self._factors(), self._strengths(strength, pairs=True))
        return float(dense) + float(low)

    @torch.no_grad()
    def add_gradients(self, strength: float, value: bool = False) -> float | None:
        """Add strength · F (θ − θ*) to every `.grad`, in place; with `value` also give the penalty, as `value` does.

        Both come from one sweep over the weights, which costs half of two.
        """
        rows = [(i, p, p.grad) for i, p in enumerate(self.dense) if p.grad is not None]
        anchors, importance = self._local()
        strengths, of_pairs = self._strengths(strength), self._strengths(strength, pairs=True)
        dense = penalties.add_quadratic_gradient(
            [params.local(gradient) for _, _, gradient in rows],
            [params.local(parameter) for _, parameter, _ in rows],
            [anchors[i] for i, _, _ in rows],
            [importance[i] for i, _, _ in rows],
            [strengths[i] for i, _, _ in rows],
            value,
        )
        factors = self._factors()
        for pair, slopes in zip(self.pairs, penalties.low_rank_gradients(factors, of_pairs)):
            for parameter, slope in zip((pair.B, pair.A), slopes):
                if parameter.grad is not None:
                    parameter.grad.add_(params.aligned(slope.to(parameter.dtype), parameter))
        if dense is None:
            return None
        # what got no gradient in this step is not pulled, but still away from its anchor
        still = [i for i, p in enumerate(self.dense) if p.grad is None]
        rest = penalties.quadratic_value(
            params.locals_of(self.dense[i].detach() for i in still),
            [anchors[i] for i in still],
            [importance[i] for i in still],
            [strengths[i] for i in still],
        )
        return float(dense) + float(rest) + float(penalties.low_rank_value(factors, of_pairs))

    def before_step(self, strength: float, form: str, value: bool) -> float | None:
        """What `form` does before the optimizer's step: "gradient" adds to the gradients. The penalty if wanted."""
        if form == "gradient":
            return self.add_gradients(strength, value)
        return self.value(strength) if value else None

    @torch.no_grad()
    def step(self, strength: float, learning_rate: float) -> None:
        """Move the weights after the optimizer by the implicit step of the pull, which no strength makes unstable."""
        anchors, importance = self._local()
        penalties.proximal(params.locals_of(self.dense), anchors, importance, self._strengths(strength), learning_rate)
        of_pairs = self._strengths(strength, pairs=True)
        for pair, factor, own in zip(self.pairs, self._factors(), of_pairs):
            for parameter, moved in zip((pair.B, pair.A), _implicit(factor, own * learning_rate)):
                parameter.copy_(params.aligned(moved.to(parameter.dtype), parameter))

    def stiffness(self, strength: float, learning_rate: float) -> float:
        """max η·λ·curvature of the pull: plain gradient descent diverges from 2 on. For LoRA that of B, as B is 0."""
        sizes = [penalties.stiffness(self._local()[1], self._strengths(strength), learning_rate)]
        for factor, own in zip(self._factors(), self._strengths(strength, pairs=True)):
            rows, columns, weight = _weights(factor)
            inner = (_exact(factor.a) * columns) @ _exact(factor.a).T
            sizes.append(own * learning_rate * weight * float(rows.max() * torch.linalg.eigvalsh(inner)[-1]))
        return max(sizes)

    def _local(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        return params.locals_of(self._anchors), [None if f is None else params.local(f) for f in self._importance]

    def _strengths(self, strength: float, pairs: bool = False) -> list[float]:
        return [strength * factor for factor in (self._factors_pairs if pairs else self._factors_dense)]

    def _factors(self) -> list[penalties.LowRank]:
        return [
            penalties.LowRank(_whole(pair.B), _whole(pair.A), scale=pair.scaling, **product)
            for pair, product in zip(self.pairs, self._products)
        ]


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, as a nearly singular product would cost float32 all its digits; Apple's GPUs have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _weights(factor: penalties.LowRank) -> tuple[torch.Tensor, torch.Tensor, float]:
    """r, c and s²/Σr in float64; ones, and s², where nothing is weighted."""
    b, a = _exact(factor.b), _exact(factor.a)
    if factor.rows is None or factor.columns is None:
        return torch.ones_like(b[:, 0]), torch.ones_like(a[0]), factor.scale**2
    rows = _exact(factor.rows)
    total = float(rows.sum())
    return rows, _exact(factor.columns), factor.scale**2 / total if total > 0 else 0.0


def _implicit(factor: penalties.LowRank, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A after one implicit step each on ½ rate · s² Σ F̂ ⊙ (BA − B0A0)², F̂ = r cᵀ / Σr.

    In B alone the pull is quadratic, row by row: with G = A D_c Aᵀ and k_i = rate · s² r_i / Σr the step is
    b_i ← (b_i + k_i b0_i A0 D_c Aᵀ)(I + k_i G)⁻¹, and one eigenbasis of G serves all rows. Then the same in A,
    by transposition.
    """
    rows, columns, weight = _weights(factor)
    b, a = _exact(factor.b), _exact(factor.a)
    anchor = turned = None
    if factor.b0 is not None and factor.a0 is not None:
        b0, a0 = _exact(factor.b0), _exact(factor.a0)
        anchor, turned = (b0, a0), (a0.T, b0.T)
    b = _implicit_left(b, a, anchor, rows * (rate * weight), columns)
    a = _implicit_left(a.T, b.T, turned, columns * (rate * weight), rows).T
    return b, a


def _implicit_left(
    left: torch.Tensor,
    right: torch.Tensor,
    anchor: tuple[torch.Tensor, torch.Tensor] | None,
    stiff: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """argmin over X of ½‖X − left‖² + ½ Σ_i stiff_i ‖(X right − anchor)_i‖²_columns; shapes as B, A, [m], [n]."""
    inner = (right * columns) @ right.T
    values, basis = torch.linalg.eigh(inner)
    # written as a move from where it is, so that nothing to do leaves every bit
    push = -left @ inner
    if anchor is not None:
        push = push + anchor[0] @ ((anchor[1] * columns) @ right.T)
    return left + (stiff[:, None] * (push @ basis) / (1 + stiff[:, None] * values.clamp_min(0))) @ basis.T
