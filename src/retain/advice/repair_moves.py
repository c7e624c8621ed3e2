"""Ways back from a fine-tune to its base: each makes one tensor of both, piece by piece.

With θ⁰ the base, θ the fine-tune and τ = θ − θ⁰:

- interpolation: θ⁰ + α τ (WiSE-FT, Wortsman 2022, arXiv:2109.01903); or an own α per group of layers (`Grouped`);
- TIES: of every tensor the largest |τ| stay (Yadav 2023, arXiv:2306.01708, step 1). There is one task vector, so there
  is no sign to elect and nothing to average;
- magnitude: the largest |τ| stay, of all tensors together (`Magnitude`);
- DARE: entries of τ stay by chance and are divided by their share (Yu 2023, arXiv:2311.03099);
- intruders: singular directions that the base does not have are scaled down (`Reduced`; Shuttleworth 2024,
  arXiv:2410.21228).

Interpolation, TIES and DARE are recipes of `retain merge`. All sums are in float32 at least.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from retain.functional.intruders import Intruders
from retain.functional.task_vectors import kept_entries, kth_magnitude, trim
from retain.models.merge_recipe import Combining, Pieces, Recipe

#: Where no setting is asked for. The tuned model (α = 1) and the base (α = 0) are asked anyway.
SHARES = (0.1, 0.25, 0.5, 0.7, 0.85)
TRIMMED, DROPPED = (0.1, 0.3), (0.3,)
REDUCED = (0.5, 1.0)
#: Largest directions of a matrix among which intruders are looked for, and the cosine below which one is (as in PEFT).
TOP, THRESHOLD = 10, 0.5
_ATTENTION = re.compile(r"(^|\.)(self_)?(attn|attention)\.|input_layernorm|\bln_1\b")


#: The tuned model as it is.
WHOLE = Recipe("interpolate", (1.0,))


@dataclass(frozen=True)
class Candidate:
    """A point to be asked about.

    Args:
        name: also of its files.
        family: the kind of move.
        settings: what sets it apart from others of its kind.
        move: makes its weights.
        scales: every change of a tensor is multiplied by one number, so that an adapter stays one, exactly.
        folder: of an adapter on the tuned model that is put on first; None for the tuned model as it is.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    move: Combining = WHOLE
    scales: bool = False
    folder: str | None = None


@dataclass(frozen=True)
class Grouped(Combining):
    """θ⁰ + α_g τ, g the group of the tensor.

    Args:
        alphas: group → α.
        groups: tensor name → group.
    """

    alphas: Mapping[str, float]
    groups: Mapping[str, str]
    seed: int = 0

    def combine(self, pieces: Pieces) -> Iterator[tuple[slice, Tensor]]:
        """As `Recipe.combine`."""
        return Recipe("interpolate", (self.alphas[self.groups[pieces.name]],)).combine(pieces)

    def needs_angles(self) -> bool:
        """As `Recipe.needs_angles`."""
        return False

    def shares(self, products: Tensor | None = None) -> list[float] | None:
        """None: another one for every matrix."""
        return None


@dataclass(frozen=True)
class Magnitude(Combining):
    """θ⁰ + τ where |τ| ≥ least, θ⁰ elsewhere."""

    least: Tensor

    @classmethod
    def keeping(cls, density: float, entries: int, pieces: Callable[[], Iterable[Tensor]]) -> Magnitude:
        """With the share `density` of all entries.

        Args:
            entries: of τ.
            pieces: gives τ piece by piece, anew at every call, all float32 or all float64.
        """
        return cls(kth_magnitude(pieces, kept_entries(entries, density)))

    def combine(self, pieces: Pieces) -> Iterator[tuple[slice, Tensor]]:
        """As `Recipe.combine`."""
        assert pieces.start is not None
        for rows in pieces.spans:
            yield rows, trim(pieces.change(0, rows), self.least).add_(pieces.start(rows))


@dataclass(frozen=True)
class Reduced(Combining):
    """θ − strength · Σ s u vᵀ over the intruders of a matrix.

    Args:
        found: tensor name → its intruders.
        strength: 0 leaves them, 1 takes them away.
    """

    found: Mapping[str, Intruders]
    strength: float

    def combine(self, pieces: Pieces) -> Iterator[tuple[slice, Tensor]]:
        """As `Recipe.combine`."""
        mine = self.found.get(pieces.name)
        for rows in pieces.spans:
            tensor = pieces.models[0](rows)
            if mine is not None:
                taken = mine.left[rows].to(tensor.dtype) @ mine.right.to(tensor.dtype)
                tensor.sub_(taken, alpha=self.strength)
            yield rows, tensor


def plain() -> list[Candidate]:
    """Moves that need nothing but the weights, piece by piece."""
    found = [Candidate(f"interpolate-{a:g}", "interpolate", {"alpha": a}, Recipe("interpolate", (a,)), True)
             for a in SHARES]  # fmt: skip
    found += [Candidate(f"ties-{d:g}", "ties", {"density": d}, Recipe("ties", (1.0,), density=d)) for d in TRIMMED]
    found += [Candidate(f"dare-{d:g}", "dare", {"density": d}, Recipe("dare", (1.0,), density=d)) for d in DROPPED]
    return found


def groups_of(names: Sequence[str]) -> dict[str, str]:
    """Tensor name → group: attention and MLP of the lower, middle and upper third of the layers, and the rest.

    The first number in a name is that of its layer. What is in no layer (embeddings, head, last norm) is "embeddings";
    the norm before attention belongs to it.
    """
    places = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names}
    count = 1 + max((place for place in places.values() if place is not None), default=0)
    bands = ("all",) if count < 2 else ("lower", "upper") if count < 3 else ("lower", "middle", "upper")

    def group(name: str) -> str:
        place = places[name]
        if place is None:
            return "embeddings"
        return f"{bands[place * len(bands) // count]} {'attention' if _ATTENTION.search(name) else 'mlp'}"

    return {name: group(name) for name in names}
