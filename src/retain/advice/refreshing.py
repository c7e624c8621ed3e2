"""A fresh general mix for the next run: rows of the same source that no earlier run replayed.

A run that replays the same few hundred rows again and again learns these by heart; what they stand for is then kept on
them alone. So the part that was used is renewed: used rows are known by their text in one spelling, near-duplicates
count as used, and the draw depends on the seed alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retain.advice.incoming import NEAR
from retain.advice.reading import sample_of
from retain.advice.seen import is_run
from retain.data.chat import to_chat
from retain.data.filters import NearDuplicates, plain
from retain.data.sources import load_rows
from retain.errors import ConfigError, DataError
from retain.rundir import RunDirectory


@dataclass(frozen=True)
class Fresh:
    """What was drawn.

    Args:
        rows: as they stand in the mix.
        total: rows of the mix.
        used: of these, rows that an earlier run had, or nearly.
        repeated: rows that nearly repeat another row of the mix.
    """

    rows: list[dict[str, Any]]
    total: int
    used: int
    repeated: int

    def sentence(self) -> str:
        """In words."""
        left = self.total - self.used - self.repeated - len(self.rows)
        return (
            f"{len(self.rows)} fresh rows of {self.total}; {self.used} were used before, {self.repeated} repeat "
            f"others, {left} are left for later runs"
        )


def refresh(mix: str, number: int, seen: Sequence[str] = (), seed: int = 0) -> Fresh:
    """Draw rows of a mix that were not used before.

    Args:
        mix: file, folder or hub id.
        number: rows wanted.
        seen: runs, whose replayed rows count as used, and files of earlier mixes.
        seed: of the draw.

    Raises:
        ConfigError: fewer than one row wanted.
        DataError: fewer fresh rows than wanted, or as `load_rows`.
    """
    if number < 1:
        raise ConfigError(f"--rows: {number} given. Allowed: 1 or more.")
    rows = load_rows(mix)
    texts = sample_of(to_chat(rows, mix), mix).texts
    near, known = NearDuplicates(NEAR), set()
    for text in used_texts(seen, mix):
        near.add(text)
        known.add(plain(text))
    places, used, repeated = [], 0, 0
    for place in np.random.default_rng(seed).permutation(len(texts)):
        text = texts[place]
        if plain(text) in known or near.seen(text):
            used += 1
        else:
            places.append(int(place))
    own, kept = NearDuplicates(NEAR), []
    for place in places:
        if own.seen(texts[place]):
            repeated += 1
            continue
        own.add(texts[place])
        kept.append(place)
    if len(kept) < number:
        raise DataError(
            f"{mix}: {len(kept)} fresh rows of {len(texts)} are left ({used} used, {repeated} repeat others), {number} "
            f"wanted. Give a larger mix, or --rows {len(kept)}."
        )
    chosen = sorted(kept[:number])
    return Fresh([rows[place] for place in chosen], len(texts), used, repeated)


def used_texts(seen: Sequence[str], mix: str) -> Iterable[str]:
    """Texts of rows that earlier runs replayed, and of the files given."""
    for where in seen:
        if not is_run(where):
            yield from sample_of(to_chat(load_rows(where), where), where).texts
            continue
        for name, rows in replayed(where):
            yield from sample_of(rows, name).texts


def replayed(run: str) -> Iterable[tuple[str, Any]]:
    """Rows that stood for old data in a run, drawn as it drew them: (source, rows in chat form)."""
    from retain.data import replay_sources as origins
    from retain.inputs import load_old
    from retain.methods import build

    config = RunDirectory(run).read_config()
    old = load_old(config)
    for method in build(config.methods):
        settings = method.config
        listed = list(getattr(settings, "sources", []))
        if method.name == "replay" and not listed and old is not None and settings.source in ("auto", "old"):
            yield "old", origins.some(old, settings.rows, config.seed)
        for source in listed:
            if source.data == "old" and old is not None:
                yield "old", origins.some(old, source.limit or settings.rows, config.seed)
            elif source.data not in origins.OWN:
                yield source.data, origins.read(source, config.seed)
        if method.name == "der" and old is not None and settings.source == "auto":
            yield "old", old.select(range(min(settings.old, len(old))))


def write_rows(fresh: Fresh, path: Path, again: bool = False) -> None:
    """Write the rows as JSON Lines; a file that is there is left alone unless `again`.

    Raises:
        ConfigError: it is there, or cannot be written.
    """
    from retain.advice.advisor import write

    write("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in fresh.rows), path, again)
