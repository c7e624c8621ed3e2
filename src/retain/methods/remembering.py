"""What methods with an importance of weights share: it is kept from task to task, in files that others can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from pydantic import Field

from retain.errors import ConfigError
from retain.functional import fisher
from retain.methods.context import Run
from retain.methods.pulling import Pulling
from retain.models import importance, importance_cache, params
from retain.models.importance import Importance


class Remembering(Pulling):
    """Pulls by an importance F of each weight: F ← decay · F + F of the task that ended, one anchor, the latest start.

    A subclass says what F is before the first task (`first`) and after a task (`learned`).
    """

    keeps_first: ClassVar[bool] = True  # F from before the first task is written: it is costly to make again

    class Config(Pulling.Config):
        decay: float = Field(1.0, ge=0, le=1)
        """How much of the importance from before is kept when a task is added: 1 adds up, 0 keeps the last task's."""
        importance: str | None = None
        """Take the importance before the first task from this file, or from the directory of a run that began with
        the same model."""

    finds_again: ClassVar[bool] = True  # a file says of which weights it is, so that a run's directory is enough

    _importance: params.Tensors

    def first(self, model: Any, run: Run) -> Importance:
        """F before the first task."""
        raise NotImplementedError

    def unknown(self, model: Any, run: Run) -> Importance:
        """F of what no earlier task trained; it may hold more."""
        return self.first(model, run)

    def learned(self, model: Any, run: Run) -> Importance | None:
        """F of the task that ended, of mean 1; None where there is nothing to estimate it on."""
        raise NotImplementedError

    def check(self, tasks: Sequence[str] = ()) -> None:
        super().check(tasks)
        if self.auto and getattr(self.config, "units", "normalised") == "raw":
            raise ConfigError(
                f"methods.{self.name}.strength: 'auto' begins at {self.config.strength:g}, which does nothing in raw "
                "units. Give a number (`retain plan` shows the usual ones), or leave `units` out."
            )
        place = self.config.importance
        if place is not None and not Path(place).exists():
            raise ConfigError(
                f"methods.{self.name}.importance: '{place}' is not there. Give a safetensors file, or the directory of "
                "a run."
            )

    def given(self, path: Path, model: Any) -> Importance:
        """F from a file that the user gave, in the units of this method."""
        where = f"methods.{self.name}.importance"
        found = importance.fitting(importance.read(path), model, where)
        return importance.in_units(found, model, getattr(self.config, "units", "normalised"), where)

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        path = self._file(run, run.task_index)
        known = importance.load(path, run.restored or run.task_index > 1)
        if known is None:
            if self.config.importance is None:
                known = self.first(model, run)
            else:
                where = f"methods.{self.name}.importance"
                file = importance_cache.given(self.config.importance, model, self.name, where)
                known = self.given(file, model)
                self._say_origin(file, known, run)
            PartialState().wait_for_everyone()  # all have read before one writes
            if self.keeps_first or self.config.importance is not None:
                importance.save(known, path)
        else:
            known = self._completed(known, model, run, path)
        self._about, self._importance = known.about, known.tensors
        self.hold(model, run, known.tensors)

    def on_task_end(self, model: torch.nn.Module, run: Run) -> None:
        if run.shared is None:
            return
        learned = self.learned(model, run)
        if learned is None:
            return
        decay = self.config.decay
        total = importance.added(self._importance, learned.tensors, decay)
        parts = [(Importance(self._importance, self._about), decay), (learned, 1.0)]
        about = learned.about | {"means": importance.raw_means(parts, total), "tasks": self._about.get("tasks", 0) + 1}
        # adapters are merged or left behind after this, so that no later model has these weights
        if self.finds_again and PartialState().is_main_process and not params.lora_pairs(model):
            about["weights"] = importance_cache.fingerprint(model)
        importance.save(Importance(total, about), self._file(run, run.task_index + 1))

    def _completed(self, known: Importance, model: Any, run: Run, path: Path) -> Importance:
        """F from the tasks before, with what is trained now and was not then; written, as a resumed run needs it.

        Where the number of decoder layers changed, names stand for other weights, and all of it is made anew.
        """
        layers, now = known.about.get("layers"), len(params.decoder_layers(model))
        anew = layers not in (None, now)
        wanted, tensors = importance.shapes(model), importance.summed(known.tensors, model)
        missing = [n for n, shape in wanted.items() if n not in tensors or tuple(tensors[n].shape) != shape]
        if not anew and not missing:
            return Importance(tensors, known.about)
        fresh = self.unknown(model, run)
        if anew:
            run.say(
                f"{self.name}: the model has {now} decoder layers, before {layers}; weights have other names, so the "
                "importance of all of them is taken anew."
            )
            whole = fresh
        else:
            run.say(
                f"{self.name}: {len(missing)} of {len(wanted)} tensors were not trained before; their importance is "
                "new, that of the others is kept."
            )
            gone = set(missing)
            kept = Importance({n: t for n, t in tensors.items() if n not in gone}, importance.with_held(known))
            added = Importance({n: fresh.tensors[n] for n in missing}, importance.with_held(fresh))
            total = kept.tensors | added.tensors
            means = importance.raw_means([(kept, 1.0), (added, 1.0)], total)
            about = {key: value for key, value in known.about.items() if key not in ("key", "held")}
            whole = Importance(total, about | {"means": means, "layers": now})
        PartialState().wait_for_everyone()  # all have read before one writes
        importance.save(whole, path)
        return whole

    def about(self, model: Any, **more: Any) -> dict[str, Any]:
        """What the header of a file says."""
        name = getattr(params.causal(model).config, "_name_or_path", "")
        units = getattr(self.config, "units", "normalised")
        layers = len(params.decoder_layers(model))
        return {"method": self.name, "model": name, "units": units, "layers": layers} | more

    def _file(self, run: Run, index: int) -> Path:
        """The importance that holds during task `index`."""
        return run.shared_folder / self.name / f"{index:02d}.safetensors"

    def _say_origin(self, path: Path, found: Importance, run: Run) -> None:
        about = found.about
        made = f"{about.get('method', 'another program')}, {about.get('estimator', 'unknown')}"
        run.say(f"{self.name}: importance of weights from {path} ({made}, model {about.get('model') or 'unnamed'}).")


class Estimating(Remembering):
    """Estimates F on rows: `importance` of old rows before the first task, of a task's own when it ended.

    A streamed task adds nothing: its rows are not there a second time. That is said before it is trained.
    """

    class Config(Remembering.Config):
        samples: int = Field(1000, ge=1)
        """Rows that the importance is estimated on, at most."""
        units: Literal["normalised", "raw"] = "normalised"
        """`normalised`: F has mean 1, so a strength means the same on every model. `raw`: F as estimated, for
        strengths of papers."""

    #: Settings that a pull has and an estimate does not depend on.
    PULLS: ClassVar[set[str]] = set(Remembering.Config.model_fields) | {"samples"}

    def importance(self, model: Any, run: Run, rows: Any) -> params.Tensors:
        """F by parameter name on at most `samples` rows."""
        raise NotImplementedError

    def first(self, model: Any, run: Run) -> Importance:
        rows = run.old_rows(model, self.config.samples)
        rows = rows.select(range(min(len(rows), self.config.samples)))
        key = weights = ""
        if run.shared is not None:
            settings = [self.name, run.seed + run.task_index, self.config.model_dump(exclude=self.PULLS)]
            weights = importance_cache.fingerprint(model)
            key = importance_cache.key(model, weights, run.batches(rows, 16), settings)
            path = importance_cache.find(key)
            cached = None if path is None else importance.read(path)
            PartialState().wait_for_everyone()  # all have looked before one writes
            if cached is not None and self._is_whole(cached, model):
                run.say(f"{self.name}: same model, old rows and settings as before; importance taken from {path}.")
                return cached
        found = Importance(self.importance(model, run, rows), {})
        found.about = self._described(model, len(rows), key=key, weights=weights, tasks=0)
        return found

    def learned(self, model: Any, run: Run) -> Importance | None:
        if run.new_rows is None:
            return None
        with params.evaluating(model):
            found = Importance(self.importance(model, run, run.new_rows))
        found.about = self._described(model, min(len(run.new_rows), self.config.samples))
        return found

    @property
    def reads_task(self) -> bool:
        """Whether F of a task that ended is estimated on its rows, which a stream does not give a second time."""
        return True

    def on_task_start(self, model: torch.nn.Module, run: Run) -> None:
        if self.reads_task:
            run.say_unread(self.name, "its importance is not added for later tasks")
        super().on_task_start(model, run)
        key = self._about.get("key")
        if key and PartialState().is_main_process and run.task_index == 1:
            importance_cache.remember(key, self._file(run, 1))

    def _is_whole(self, cached: Importance, model: Any) -> bool:
        """Whether a cached importance is of exactly what is trained, in the units of this method."""
        sizes = {name: tuple(tensor.shape) for name, tensor in cached.tensors.items()}
        return sizes == importance.shapes(model) and cached.about.get("units") == self.config.units

    def scaled(self, **groups: fisher.Importance) -> None:
        """Bring F of "dense" and "adapted" weights into the chosen units, in place, by one factor for both: they are
        importances of single weights alike. Their means and origin are kept for the header."""
        self._means = {group: found.total() / found.count() for group, found in groups.items()}
        self._estimator = [found.estimator for found in groups.values()][-1]
        fisher.normalise(*groups.values())
        if self.config.units == "raw":
            for found in groups.values():
                fisher.unscaled(found)

    def _described(self, model: Any, rows: int, **more: Any) -> dict[str, Any]:
        means, estimator = getattr(self, "_means", {}), getattr(self, "_estimator", "")
        return self.about(model, estimator=estimator, rows=rows, means=means, **more)
