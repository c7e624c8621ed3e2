"""Repair: the best recoverable point between a base and a fine-tune of it that has forgotten.

Base, tuned model and every candidate are asked the same items; what they answered is kept in the output folder, so that
a repair that was killed goes on. The point is chosen on the control half of the items and reported on the held one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retain.advice import repair_models
from retain.advice.repair_choice import (
    HALVES,
    Asked,
    Point,
    Record,
    Sides,
    balance,
    by_family,
    choose,
    half_of,
    within,
)
from retain.advice.repair_moves import REDUCED, TRIMMED, Candidate, Grouped, Reduced, plain
from retain.advice.repair_search import Alphas, coordinates
from retain.errors import ConfigError, DataError, RunError
from retain.models.merge_recipe import Recipe
from retain.probes.base import Probe, texts_of_items
from retain.results import Estimate, load_items, save_items, write_text

Say = Callable[[str], None]
#: (model, tokenizer, probes, called with the number of items just asked) → item rows.
Ask = Callable[[Any, Any, Sequence[Probe], Callable[[int], None]], list[dict[str, Any]]]
#: (label, how many) → context of a progress bar.
Watched = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
#: Points of the search over groups of layers, each asked the control half.
SEARCH = 10
TUNED = Candidate("tuned", "tuned", scales=True)


@dataclass(frozen=True)
class Settings:
    """What is looked for, and how hard.

    Args:
        lose_at_most: largest upper bound of the loss of a chosen point; None for the best balance.
        confidence: of all intervals.
        train_steps: of self-distillation; 0 for none; None leaves it to the size of the model.
        search: most points of the search over groups of layers; 0 for none.
        seed: of what is drawn.
    """

    lose_at_most: float | None = None
    confidence: float = 0.95
    train_steps: int | None = None
    search: int = SEARCH
    seed: int = 0


class Repair(Record):
    """What a repair came to; `repair.json`.

    `lost`, `learned`: of the tuned model on all items. `chosen`: name of the point; None where nothing was to be
    repaired, or nothing is inside the budget. `inside`: whether the held half shows the chosen point inside the budget.
    """

    base: str
    tuned: str
    keep: list[str]
    learn: list[str]
    items: dict[str, int]  # half → items
    confidence: float
    lose_at_most: float | None
    units: tuple[str, str]  # of losses, and of gains: points, or nats per token
    base_score: float  # of the base on the kept probes of the held half
    lost: Estimate
    learned: Estimate
    points: list[Point]
    best: dict[str, str] = {}  # kind of move → its best point by the control half
    chosen: str | None = None
    inside: bool | None = None
    form: str = ""  # "adapter" or "model"
    folder: str = ""
    notes: list[str] = []

    def point(self, name: str) -> Point:
        """By its name."""
        return next(point for point in self.points if point.name == name)


@dataclass
class Repairing:
    """The state of one repair.

    Args:
        base, tuned: names of the models.
        kept, learned: probes.
        folder: of everything that is written.
        ask: asks a model.
    """

    base: str
    tuned: str
    kept: Sequence[Probe]
    learned: Sequence[Probe]
    folder: Path
    ask: Ask
    watched: Watched
    settings: Settings = field(default_factory=Settings)
    say: Say = print
    device: str = "cpu"

    def __post_init__(self) -> None:
        old, new = [p.info("reference") for p in self.kept], [p.info("task") for p in self.learned]
        names = [info.name for info in (*old, *new)]
        for name in names:
            if names.count(name) > 1:
                raise DataError(
                    f"repair: two probes are called '{name}'. Give the rows of --learned their own `probe`."
                )
        for probe in (*self.kept, *self.learned):
            least = 2 * max(2, probe.fewest)
            if len(probe.items) < least:
                raise DataError(
                    f"repair: {len(probe.items)} items for '{probe.name}'; at least {least} are needed, as a point is "
                    "chosen on one half and reported on the other. Give more, or raise --limit."
                )
        self.asked = Asked(old, new, self.settings.confidence)
        self.halves = {half: [_part(p, half) for p in (*self.kept, *self.learned)] for half in HALVES}
        self.notes: list[str] = []
        self.number, self.total = 0, 0

    def run(self) -> Repair:
        """Look for the best point, or go on looking; the chosen one is written.

        Raises:
            RetainError: models that are no pair, probes that cannot be used, or a folder of another repair.
        """
        self.both = repair_models.open_both(self.base, self.tuned)
        self._begin()
        repair_models.load_live(self.both, self.base, self.device)
        first = {half: (self._rows(None, half), self._rows(TUNED, half)) for half in HALVES}
        self.first = first
        base, tuned = ([row for half in HALVES for row in first[half][side]] for side in (0, 1))
        whole = self.asked.sides(base, tuned, tuned)
        start = self._point(TUNED)
        if self._nothing_lost(whole):
            return self._finish(whole, [start], None)
        candidates = list(self._candidates())
        self.total = len(candidates)
        points = [start, *(self._point(candidate) for candidate in candidates)]
        if self.settings.search:
            found = self._searched(points, start)
            candidates.append(found)
            points.append(self._point(found))
        for found in self._distilled():
            candidates.append(found)
            points.append(self._point(found))
        chosen = choose(points, start, self.settings.lose_at_most)
        taken = next((c for c in [TUNED, *candidates] if chosen is not None and c.name == chosen.name), None)
        return self._finish(whole, points, taken)

    # -- asking ------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        """Know the folder again, or make it one of this repair."""
        models = repair_models.weights_stamp([self.both.base, self.both.tuned])
        asked = [(p.name, p.kind, p.options, [(i.id, i.fields) for i in p.items]) for p in (*self.kept, *self.learned)]
        text = json.dumps([models, asked, self.settings.seed], default=str, sort_keys=True)
        stamp, path = hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), self.folder / "asked.json"
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != stamp:
                raise RunError(
                    f"{self.folder}: holds a repair of other models or with other items. Choose another --output."
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise RunError(f"{self.folder}: is not empty, and no repair. Choose another --output.")
        write_text(path, json.dumps(stamp) + "\n")

    def _rows(self, candidate: Candidate | None, half: str) -> list[dict[str, Any]]:
        """What a candidate, or the base, answers to one half."""
        name = candidate.name if candidate else "base"
        path = self.folder / "answers" / f"{name}-{half}.parquet"
        if path.is_file():
            return load_items(path)
        probes = self.halves[half]
        model, words = self.both.put(candidate), self.both.tokenizers[candidate is not None]
        place = f" ({self.number} of {self.total})" if self.total else ""
        with self.watched(f"{name}{place}", sum(len(p.items) for p in probes)) as progress:
            rows = self.ask(model, words, probes, progress)
        save_items(rows, path)
        return rows

    def _sides(self, candidate: Candidate, half: str) -> Sides:
        return self.asked.sides(*self.first[half], self._rows(candidate, half))

    def _point(self, candidate: Candidate) -> Point:
        self.number += candidate is not TUNED
        sides = {half: self._sides(candidate, half) for half in HALVES}
        return Point(name=candidate.name, family=candidate.family, settings=candidate.settings, **sides)

    # -- candidates --------------------------------------------------------------------------------------
    def _candidates(self) -> Iterator[Candidate]:
        yield from plain()
        for density in TRIMMED:
            yield Candidate(f"magnitude-{density:g}", "magnitude", {"density": density}, self.both.magnitude(density))
        with self.watched("looking for intruders", len(self.both.matrices)) as progress:
            found = self.both.intruders(self.folder / "intruders.safetensors", progress)
        if found:
            count = sum(len(one.places) for one in found.values())
            self._note(f"{count} intruder dimensions in {len(found)} of {len(self.both.matrices)} matrices.")
            for strength in REDUCED:
                settings = {"strength": strength, "intruders": count}
                yield Candidate(f"intruders-{strength:g}", "intruders", settings, Reduced(found, strength))
        else:
            self._note("no intruder dimensions in any matrix; nothing to reduce.")

    def _distilled(self) -> Iterator[Candidate]:
        """Last, as it takes longest."""
        from retain.advice.repair_distill import default_steps, distilled

        steps = self.settings.train_steps
        steps = default_steps(self.both.live) if steps is None else steps
        if steps and (Path(self.base) / "run.yaml").is_file():
            self._note("no self-distillation: the base is a run. `retain export` it first.")
        elif steps:
            avoid = texts_of_items([*self.kept, *self.learned])
            place = self.folder / f"distilled-{steps}"
            try:
                adapter = distilled(self.both, self.base, steps, place, self.settings.seed, avoid, self.say)
            except DataError as error:  # the base wrote nothing that can be used; other moves can still be tried
                self._note(f"no self-distillation: {error}")
                return
            settings = {"steps": steps}
            yield Candidate(f"distill-{steps}", "distill", settings, Recipe("interpolate", (1.0,)), folder=str(adapter))

    def _searched(self, points: Sequence[Point], start: Point) -> Candidate:
        """An own α for each group of layers, from the best single one on."""
        single = by_family([p for p in points if p.family == "interpolate"], start, self.settings.lose_at_most)
        alpha = single["interpolate"].settings["alpha"]
        names = list(dict.fromkeys(self.both.groups.values()))
        self.number, self.total = 0, self.settings.search

        def worth(alphas: Alphas) -> tuple[float, ...]:
            side = self._sides(self._grouped(alphas), "control")
            self.number += 1
            if self.settings.lose_at_most is None:
                return balance(side, start.control)
            return within(side, start.control, self.settings.lose_at_most)

        best, asked = coordinates(dict.fromkeys(names, alpha), worth, self.settings.search)
        self.number, self.total = 0, 0
        self._note(f"groups: {asked} points asked the control half, from α = {alpha:g} for all {len(names)} groups.")
        return self._grouped(best)

    def _grouped(self, alphas: Alphas) -> Candidate:
        text = ",".join(f"{group}={share:g}" for group, share in alphas.items())
        name = f"groups-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        return Candidate(name, "groups", dict(alphas), Grouped(alphas, self.both.groups), True)

    # -- the end -----------------------------------------------------------------------------------------
    def _nothing_lost(self, whole: Sides) -> bool:
        budget = self.settings.lose_at_most
        return whole.lost.low <= 0 if budget is None else whole.upper <= budget

    def _finish(self, whole: Sides, points: list[Point], chosen: Candidate | None) -> Repair:
        budget, form, place, inside = self.settings.lose_at_most, "", "", None
        start = points[0]
        if chosen is None or chosen is TUNED:  # of the same repair with another budget
            for old in ("adapter", "model"):
                if (self.folder / old / "merge.json").is_file():
                    shutil.rmtree(self.folder / old)
        if chosen is not None:
            held = next(p for p in points if p.name == chosen.name).held
            inside = None if budget is None or held is None else held.upper <= budget
            form, place = self._write(chosen)
        found = Repair(
            base=self.base, tuned=self.tuned, keep=[i.name for i in self.asked.kept],
            learn=[i.name for i in self.asked.learned],
            items={half: sum(len(p.items) for p in self.halves[half]) for half in HALVES},
            confidence=self.settings.confidence, lose_at_most=budget,
            units=self.asked.units(self.first["held"][0]), base_score=self.asked.score(self.first["held"][0]),
            lost=whole.lost, learned=whole.learned,
            points=points, best={f: p.name for f, p in by_family(points, start, budget).items()},
            chosen=chosen.name if chosen else None, inside=inside, form=form, folder=place, notes=self.notes,
        )  # fmt: skip
        write_text(self.folder / "repair.json", found.model_dump_json(indent=1) + "\n")
        return found

    def _write(self, chosen: Candidate) -> tuple[str, str]:
        """Write the chosen point, unless it is the tuned model or was written before."""
        if chosen is TUNED:
            return "", ""
        for form in ("adapter", "model"):
            record = self.folder / form / "merge.json"
            if record.is_file():
                if json.loads(record.read_text(encoding="utf-8")).get("point") == chosen.name:
                    return form, str(self.folder / form)
                shutil.rmtree(self.folder / form)  # of the same repair with another budget
        to = self.folder / ("adapter" if self.both.adapted and chosen.scales and not chosen.folder else "model")
        about = {"method": "repair", "point": chosen.name, "base": self.base, "models": [self.tuned]}
        form, share = self.both.write(chosen, to, about | {"settings": chosen.settings})
        if share < 1 - 1e-6:
            self._note(f"the adapter holds {100 * share:.2f} % of the squared norm of the change.")
        return form, str(to)

    def _note(self, line: str) -> None:
        self.notes.append(line)
        self.say(line)


def _part(probe: Probe, half: str) -> Probe:
    """A probe with the items of one half."""
    where = half_of(probe.name, [item.id for item in probe.items])
    items = [item for item in probe.items if where[item.id] == half]
    return type(probe)(probe.name, items, probe.group, **probe.options)


def check(settings: Settings) -> None:
    """Refuse settings that are impossible.

    Raises:
        ConfigError: such a setting.
    """
    if not 0.5 < settings.confidence < 1:
        raise ConfigError(f"--confidence: {settings.confidence:g} given; allowed: above 0.5, below 1.")
    if settings.lose_at_most is not None and not 0 <= settings.lose_at_most < 1:
        raise ConfigError(
            f"--lose-at-most: {settings.lose_at_most:g} given; allowed: 0 to below 1, as a share (0.01 is one point)."
        )
    if (settings.train_steps or 0) < 0 or settings.search < 0:
        raise ConfigError("--train-steps, --search: allowed: 0 (none) or more.")
