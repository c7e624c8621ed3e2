"""A forgetting budget: strengths that follow the drift while a model trains, and as much of what was learned afterwards
as is inside the budget.

Every `every` optimizer steps the main process takes the divergence from the base on fixed texts, and the others wait;
one factor on the strengths of the methods and on the share of replay follows it (`functional.budget.Dual`). At a few of
these looks the probes are asked, from which the drift that is allowed is set right (`drift_limit`). After training the
largest step towards what was learned is taken whose loss is inside the budget (`settling`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from retain.config import BudgetConfig
from retain.data.sources import load_texts
from retain.errors import ConfigError, RunError
from retain.functional import budget as maths
from retain.methods.base import validated
from retain.models import params
from retain.probes.base import Probe
from retain.probes.suite import load_probes
from retain.results import Budget, append, load_items, load_records, save_items
from retain.training import hosts, raising, settling
from retain.training.control import Control, Rows
from retain.training.looks import Baseline, Looker, anchor_texts, undisturbed
from retain.training.standing import Standing, asked_at
from retain.training.watch import forget

logger = logging.getLogger(__name__)
Source = str | Path | Probe
BESIDE = "budget/"  # before the names of the last look's weights in a checkpoint
BEFORE = "before.parquet"
#: Largest factor on strengths that a person chose, and on those that are found.
MOST, MOST_AUTO = 8.0, 32.0


class ForgettingBudget(TrainerCallback):
    """Keeps what is lost inside a budget. Give it to a `ContinualTrainer` as `budget`.

    Args:
        lose_at_most: of the score, in the mean over the probes: 0.01 is one point.
        on: what must be kept: suites, files, folders, or `Probe` objects; `core` when not given.
        tasks: probes of what is being learned, in the same forms.
        before: item rows of the base for all these probes; asked when training begins if not given.
        anchors: texts on which the drift is taken, or a file of them as in the setting `anchors`; of the core suite, as
            chats if the model has a template, when not given.
        folder: for the baseline and the outcome; `<output_dir>/budget` when not given.
        log: the JSON Lines file; `<output_dir>/budget.jsonl` when not given.
        task: name that its records carry.
        follow: a baseline in `folder` holds for this training too: it is a later task of one run.
        tokenizer: when the trainer has none.
        precision: the arithmetic of the probes; the training's when not given.
        settle: whether the last step, after training, is taken too.
        say: receives one line per event.
        settings: fields of `BudgetConfig`.

    After training `outcome` holds what it came to (`results.Budget`).

    Raises:
        ConfigError: an unknown setting, or one that cannot be used; when training begins, a budget that so few items
            cannot certify, or a model or a method that cannot be led back.
        DataError: probes or anchors that cannot be used.
    """

    folder: Path
    log: Path
    dual: maths.Dual  # since `attach`, as are the next ones since training began

    def __init__(
        self,
        lose_at_most: float | None = None,
        *,
        on: Sequence[Source] | Source | None = None,
        tasks: Sequence[Source] = (),
        before: Rows | None = None,
        anchors: Sequence[str] | str | None = None,
        folder: str | Path | None = None,
        log: str | Path | None = None,
        task: str = "",
        follow: bool = False,
        tokenizer: Any = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        settle: bool = True,
        say: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        given: list[Source] | None = [on] if isinstance(on, str | Path | Probe) else None if on is None else list(on)
        if given is not None:
            settings["on"] = [one.name if isinstance(one, Probe) else str(one) for one in given]
        if lose_at_most is not None:
            settings["lose_at_most"] = lose_at_most
        if isinstance(anchors, str):
            settings["anchors"] = anchors
        self.settings: BudgetConfig = validated(BudgetConfig, settings, "budget")
        c = self.settings
        self.control = Control(
            _loaded((c.on or ["core"]) if given is None else given), _loaded(tasks), c, before, precision
        )
        self.texts = _texts(c) if anchors is None or isinstance(anchors, str) else list(anchors)
        self._places = (folder, log)
        self.task, self.follow, self.tokenizer, self.settles = task, follow, tokenizer, settle
        self.say = say or logger.warning
        self.standing = Standing()
        self.outcome: Budget | None = None
        self.trainer: Any = None
        self._driven: list[str] = []
        self._last: dict[str, torch.Tensor] = {}  # trained weights at the last look, on the CPU

    @classmethod
    def of(cls, given: Any, **more: Any) -> ForgettingBudget:
        """From what a person gives: a number, settings, or a budget."""
        if isinstance(given, cls):
            return given
        if isinstance(given, BudgetConfig):
            return cls(**given.model_dump(), **more)
        if isinstance(given, Mapping):
            return cls(**given, **more)
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise ConfigError(f"budget: got {given!r}. Give a number such as 0.01 (one point), or its settings.")
        return cls(float(given), **more)

    def attach(self, trainer: Any) -> ForgettingBudget:
        """Take part in a trainer with methods.

        Raises:
            ConfigError: items too few to certify the budget, or a method that cannot be led back.
        """
        if self.settles:
            settling.refuse(trainer.stack)
            if PartialState().is_main_process:
                self.control.check()
        trainer.add_callback(self)
        self.trainer = trainer
        c, found = self.settings, any(m.auto for m in trainer.stack.methods)
        self.dual = maths.Dual(c.gain, c.least, c.most or (MOST_AUTO if found else MOST))
        return self

    # -- events --------------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder, log = self._places
        self.folder = Path(folder or Path(args.output_dir) / "budget")
        self.log = Path(log or Path(args.output_dir) / "budget.jsonl")
        hosts.refuse_shards("budget")
        self._driven = raising.driven(self.trainer)
        begun: list[tuple[int, float]] = []
        if PartialState().is_main_process:
            tokenizer = self.tokenizer or kwargs.get("processing_class")
            self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            if self.tokenizer is None:
                raise ConfigError("budget: the trainer has no tokenizer. Give it `processing_class`, or `tokenizer=`.")
            self._begin(hosts.unwrapped(model), args.device, state.global_step)
            begun = [(r["step"], r["factor"]) for r in self._records()]
        self.standing, begun = hosts.from_main((self.standing, begun))
        if self._driven:
            weights = self._last if state.global_step and self.standing.step else self.trainer.run.start
            self._last = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
        for name in self._driven:
            for step, factor in begun if name == raising.REPLAY else begun[-1:]:
                self._put(name, step, factor)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        step, c = state.global_step, self.settings
        if step == self.standing.step or (step % c.every and step < state.max_steps):
            return control
        begin, main, inner = time.monotonic(), PartialState().is_main_process, hosts.unwrapped(model)
        drift, back = 0.0, None
        if main:
            drift = self._drift(inner, args.device)
            # a leap is large for the limit and for what there is: pressing down what is too much is the factor's work
            rise, allowed = drift - self.standing.drift, c.jump * max(self.standing.limit, self.standing.drift)
            back = math.sqrt(allowed / rise) if self._driven and rise > allowed else None
        back = hosts.from_main(back)
        if back is not None:
            self._move_back(inner, back)
        if main:
            stays = drift if back is None else self._drift(inner, args.device)
            self._look(inner, args, state, (drift, stays), back, begin)
        self.standing = hosts.from_main(self.standing)
        for name in self._driven:
            self._put(name, step, self.standing.dual["factor"])
        if self._driven:
            self._last = {name: p.detach().to("cpu", copy=True) for name, p in params.trainable(inner).items()}
        now = {"budget/drift": self.standing.drift, "budget/limit": self.standing.limit}
        hosts.log(self.trainer, now | ({"budget/factor": self.standing.dual["factor"]} if self._driven else {}))
        return control

    def settle(self, model: Any, run: Any) -> None:
        """Take the model back to the largest share of its way that is inside the budget; on every process."""
        if self.settles:
            self.outcome = settling.settle(self, model, run)

    # -- resume --------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights at the last look, which belong to a checkpoint."""
        return {BESIDE + name: tensor for name, tensor in self._last.items()} if self.standing.step else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_dict` gave; other names are passed over."""
        self._last = {name[len(BESIDE) :]: tensor for name, tensor in state.items() if name.startswith(BESIDE)}

    # -- looks ---------------------------------------------------------------------------------------------
    def _begin(self, model: Any, device: torch.device, step: int) -> None:
        """The base as the anchors and probes saw it, and the standing: new, or as the log has it at this step."""
        c = self.settings
        forget(self.log, lambda r: r.get("kind") == "budget" and r.get("task") == self.task and r["step"] > step)
        if step == 0:
            forget(self.log, lambda r: r.get("kind") == "budget" and r.get("task") == self.task)
        self.looker = drift_looker(c, self.tokenizer, self.texts)
        kept = Baseline.load(self.folder) if step or self.follow else None
        if kept is None and step:
            raise RunError(f"{self.folder}: no baseline of the budget to go on with. Begin the training anew.")
        if kept is not None and kept.digest != self.looker.digest:
            raise ConfigError(f"budget: the baseline in {self.folder} is of other anchors. Give another `folder`.")
        if kept is None:
            with undisturbed(model, device):
                kept = self.looker.baseline(model, step)
            kept.save(self.folder)
        self.base = kept
        if self.control.before is None:
            self._ask_before(model, device, step)
        records = self._records()
        if records:
            self.standing = Standing(**records[-1]["standing"])
            return
        self.standing = Standing(dual=self.dual.begin())
        self.standing.limit = self.standing.allowed(c, self.control.kinds)
        if self.follow:  # an earlier task may have used some of it
            self.standing.drift = self._drift(model, device)

    def _ask_before(self, model: Any, device: torch.device, step: int) -> None:
        path, both = self.folder / BEFORE, {p.name: p for p in [*self.control.kept, *self.control.learned]}
        known = load_items(path) if path.is_file() and (step or self.follow) else []
        names = {row["probe"] for row in known}
        missing = [probe for name, probe in both.items() if name not in names]
        known += self.control.ask(model, self.tokenizer, device, missing)
        save_items(known, path)
        self.control.know(known)

    def _drift(self, model: Any, device: torch.device) -> float:
        with undisturbed(model, device):
            now = self.looker.proxies(model, self.base)
        return float((now.kl * self.looker.lengths).sum() / self.looker.lengths.sum())

    def _look(
        self, model: Any, args: Any, state: Any, drifts: tuple[float, float], back: float | None, begin: float
    ) -> None:
        """Take a look into account; `drifts` are what was found, and what is left after a jump was taken back."""
        c, new, step = self.settings, self.standing, state.global_step
        found, drift = drifts
        record: dict[str, Any] = {"kind": "budget", "task": self.task, "step": step, "drift": drift}
        if step in asked_at(c.calibrate, c.every, state.max_steps):
            rows = self.control.ask(model, self.tokenizer, args.device, self.control.kept)
            point, _ = self.control.point(1.0, rows)
            loss = None if point.loss is None else point.loss.value
            scores = None if point.loss is None else (point.loss.value, point.loss.low)
            nats = None if point.nats is None else (point.nats, point.nats)
            new.seen = [*new.seen, (drift, scores, nats)]
            new.room = self.control.room(point)
            new.limit = new.allowed(c, self.control.kinds)
            record |= {"loss": loss, "upper": point.upper, "nats": point.nats, "upper_nats": point.upper_nats}
        if self._driven:
            known = new.seen or c.drift is not None or not c.calibrate
            # nothing is loosened on a guess: until the probes were asked, the limit is one
            dual = self.dual if known else self.dual._replace(least=max(self.dual.least, min(1.0, self.dual.most)))
            new.dual = dual.update(new.dual, found, new.limit)  # a jump shows how weak the hold is
        new.step, new.drift, new.taken = step, drift, new.taken + (back is not None)
        record |= {"limit": new.limit, "factor": new.dual["factor"], "taken_back": None if back is None else 1 - back}
        record |= {} if back is None else {"rose_to": found}
        record |= {"standing": asdict(new), "seconds": round(time.monotonic() - begin, 3)}
        append(self.log, record)

    def _move_back(self, model: Any, share: float) -> None:
        """Leave only a share of the way since the last look."""
        with torch.no_grad():
            for name, parameter in params.trainable(model).items():
                last = self._last[name].to(parameter.device, torch.float32)
                parameter.copy_(last + share * (parameter.float() - last))

    def _put(self, name: str, step: int, factor: float) -> None:
        raising.put(self.trainer, name, step, max(1.0, factor) if name == raising.REPLAY else factor)

    def _records(self) -> list[dict[str, Any]]:
        return [r for r in load_records(self.log) if r.get("kind") == "budget" and r.get("task") == self.task]

    @property
    def driven(self) -> list[str]:
        """The methods whose strength or share follows the drift."""
        return list(self._driven)


def drift_looker(settings: BudgetConfig, tokenizer: Any, texts: Sequence[str] | None = None) -> Looker:
    """What takes the drift: on these texts, or those that the settings name."""
    c = settings
    texts = texts or _texts(c) or anchor_texts(c.anchor_count, tokenizer=tokenizer)
    return Looker(texts[: c.anchor_count], [], [], tokenizer, c.anchor_tokens, c.confidence, where="budget")


def _texts(settings: BudgetConfig) -> list[str] | None:
    return list(load_texts(settings.anchors)["text"]) if settings.anchors else None


def _loaded(sources: Sequence[Source] | Source) -> list[Probe]:
    listed = [sources] if isinstance(sources, str | Path | Probe) else sources
    return [probe for one in listed for probe in ([one] if isinstance(one, Probe) else load_probes(one))]
