"""New rows against what a model has seen: the same kind, a new kind, or not to be told; before they are learned.

Two tests on vectors of the rows (`retain.functional.two_samples`), Holm-corrected over both; how well the rows are told
apart says how large a difference is, as with many rows a trifle is significant. The model's loss on both, and rows that
are there already, say what it would mean to learn them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retain.advice.reading import Reader, Sample
from retain.data.filters import NearDuplicates, plain
from retain.errors import DataError
from retain.functional.statistics import Interval, bootstrap, holm, unit_sums
from retain.functional.two_samples import FEWEST, MMD, Told, mmd, told_apart

Kind = Literal["same kind", "new kind", "cannot tell"]
Advice = Literal["accept", "accept with more replay", "look at it first"]

#: Rows read of each side, of the errors' level, and the accuracy from which on rows are another kind.
ROWS, LEVEL, APART = 200, 0.05, 0.65
#: Share of incoming rows that are there already from which on somebody should look.
REPEATED = 0.2
#: Jaccard index of words and pairs of words from which on two rows are near-duplicates.
NEAR = 0.8


@dataclass(frozen=True)
class Source:
    """Incoming rows against one source of seen ones.

    Args:
        name: of the source.
        rows: read of it.
        mmd, told: the tests; `p` is Holm's over both.
        loss: −log p of the incoming rows' answers − that of the seen ones, nats per token, 95 % interval; None where
            no model read them.
        duplicates: share of incoming rows that nearly repeat one of this source.
        kind: what it comes to.
    """

    name: str
    rows: int
    mmd: MMD
    told: Told
    p: float
    loss: Interval | None
    duplicates: float
    kind: Kind


@dataclass(frozen=True)
class Incoming:
    """What was found. The source that the rows are most like decides.

    Args:
        rows: incoming rows that were read, of `total`.
        sources: every source, the one that is most like the rows first.
        duplicates: share of incoming rows that nearly repeat a row of any source, or an earlier incoming one.
        kind, advice: the verdict, and what it means.
        why: in a sentence.
    """

    rows: int
    total: int
    sources: list[Source]
    duplicates: float
    kind: Kind
    advice: Advice
    why: str

    @property
    def accepted(self) -> bool:
        """Whether a gate may let the rows through without anybody looking, or changing the recipe."""
        return self.advice == "accept"

    def as_values(self) -> dict[str, Any]:
        """For JSON."""
        sources = [
            asdict(one) | {"mmd": one.mmd._asdict(), "told": one.told._asdict()}
            | {"loss": one.loss._asdict() if one.loss else None}
            for one in self.sources
        ]  # fmt: skip
        return asdict(self) | {"sources": sources, "accepted": self.accepted}


def compare(
    new: Sample,
    seen: Sequence[Sample],
    reader: Reader,
    losses: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Incoming:
    """Compare incoming rows with every source of seen ones, and with all of them together.

    Args:
        new: incoming rows.
        seen: sources, such as the tasks of a run.
        reader: the model after it learned the sources.
        losses: whether its loss is taken, too.
        seed: of permutations and folds.
        progress: called with the number of rows just read, `readings` of them in all.

    Raises:
        DataError: fewer than `two_samples.FEWEST` rows of any.
    """
    for one in (new, *seen):
        if len(one) < FEWEST:
            raise DataError(f"{one.name}: {len(one)} rows, too few to compare. Give at least {FEWEST}.")
    vectors = [reader.vectors(one, progress) for one in (new, *seen)]
    read = [reader.losses(one, progress) if losses else None for one in (new, *seen)]
    repeated = [_repeats(new, one) for one in seen]
    parts = [(one.name, vectors[i], read[i], repeated[i - 1]) for i, one in enumerate(seen, 1)]
    if len(seen) > 1:
        together = np.concatenate([r for r in read[1:] if r is not None]) if losses else None
        parts.append(("all together", np.concatenate(vectors[1:]), together, np.any(repeated, axis=0)))
    sources = [_source(*part, vectors[0], read[0], seed) for part in parts]
    order = {"same kind": 0, "cannot tell": 1, "new kind": 2}
    sources.sort(key=lambda s: (order[s.kind], s.told.accuracy))
    duplicates = float(np.mean(np.any(repeated, axis=0) | _repeats_itself(new)))
    kind, advice, why = _verdict(sources[0], duplicates, len(new))
    return Incoming(len(new), new.total, sources, duplicates, kind, advice, why)


def readings(new: Sample, seen: Sequence[Sample], losses: bool = True) -> int:
    """Rows that `compare` reads, for a progress bar."""
    return (1 + losses) * sum(map(len, (new, *seen)))


def judge(p: float, told: Told) -> Kind:
    """What two tests and an accuracy come to.

    A new kind where the difference is certain and large; the same kind where it can be ruled out that it is large,
    certain or not; otherwise there are too few rows to tell.
    """
    if p <= LEVEL and told.accuracy >= APART and told.low > 0.5:
        return "new kind"
    return "same kind" if told.high < APART or (p > LEVEL and told.high <= APART) else "cannot tell"


def _source(
    name: str,
    vectors: NDArray[Any],
    losses: NDArray[Any] | None,
    repeated: NDArray[np.bool_],
    new: NDArray[Any],
    new_losses: NDArray[Any] | None,
    seed: int,
) -> Source:
    far, told = mmd(new, vectors, seed=seed), told_apart(new, vectors, seed=seed)
    p = float(min(holm([far.p, told.p])))
    loss = None
    if losses is not None and new_losses is not None:
        loss = loss_difference(new_losses, losses)
    return Source(name, len(vectors), far, told, p, loss, float(repeated.mean()), judge(p, told))


def loss_difference(new: NDArray[Any], seen: NDArray[Any], confidence: float = 0.95) -> Interval:
    """Nats per token of new rows − of seen ones; rows of each are resampled apart, as they are others.

    Args:
        new, seen: [n, 2] of nats and tokens (`Reader.losses`).
    """

    def ratio(sums: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        first, second = sums
        return first[..., 0] / first[..., 1] - second[..., 0] / second[..., 1]

    units = [unit_sums(one[:, 0] / one[:, 1], weights=one[:, 1]) for one in (new, seen)]
    return bootstrap(units, ratio, confidence, resamples=4000)


def _verdict(nearest: Source, duplicates: float, rows: int) -> tuple[Kind, Advice, str]:
    told = f"told apart from {nearest.name} in {nearest.told.accuracy:.0%} of the rows " \
           f"[{nearest.told.low:.0%}, {nearest.told.high:.0%}], 50% is chance, p {nearest.p:.3g}"  # fmt: skip
    if duplicates >= REPEATED:
        return (
            nearest.kind,
            "look at it first",
            f"{duplicates:.0%} of the rows are there already or repeat each other; {told}",
        )
    if nearest.kind == "cannot tell":
        return nearest.kind, "look at it first", f"{rows} rows are too few for this difference: {told}"
    if nearest.kind == "same kind":
        return nearest.kind, "accept", told
    return nearest.kind, "accept with more replay", told


def _repeats(new: Sample, seen: Sample) -> NDArray[np.bool_]:
    """[n]: which incoming rows nearly repeat a seen one."""
    near = NearDuplicates(NEAR)
    for text in seen.texts:
        near.add(text)
    return np.array([near.seen(text) for text in new.texts])


def _repeats_itself(new: Sample) -> NDArray[np.bool_]:
    """[n]: which incoming rows say the same as an earlier one, in one spelling."""
    known: set[str] = set()
    found = []
    for text in map(plain, new.texts):
        found.append(text in known)
        known.add(text)
    return np.array(found)
