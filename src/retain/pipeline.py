"""A run from its configuration to its report: baseline, then train and probe, task after task.

Every finished part is a file in the run directory, so the same command goes on where a killed run stopped and
ends with the same bits.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain import analysis
from retain.config import BudgetConfig, RunConfig
from retain.data.tasks import Task
from retain.errors import RetainError, RunError, disk_full
from retain.inputs import Say, budget_probes, load_probes, read_rows
from retain.methods import build
from retain.methods.base import Stack
from retain.outcome import outcome
from retain.planning import Plan, check_directory, plan
from retain.results import (
    ProbeInfo,
    Results,
    StepSummary,
    load_items,
    load_results,
    save_items,
    save_results,
    without_text,
    write_text,
)
from retain.rundir import BASE, RunDirectory, stage_name


@dataclass(frozen=True)
class Watch:
    """Told how a run stands while it goes on; what it raises ends the run, which can go on from there later.

    `task` receives the results so far when a task is learned and measured and others follow, `look` the record of every
    look of the monitor at the probes.
    """

    task: Callable[[Results], None] = lambda results: None
    look: Callable[[dict[str, Any]], None] = lambda record: None


def run(config: RunConfig, say: Say = print, watch: Watch | None = None) -> Results:
    """Carry out a run, or go on with it.

    Args:
        config: what to do.
        say: receives one line per event.
        watch: is told how it stands.

    Returns:
        The results, which are also in `results.json`, `report.html` and `report.md` of the run directory. These are
        written after every task.

    Raises:
        RetainError: anything in the input that cannot be used, or a full disk; nothing that was finished is lost.
    """
    return _kept(config, lambda: _Runner(plan(config), say, watch or Watch()).run())


def measure_base(config: RunConfig, say: Say = print) -> list[ProbeInfo]:
    """Ask the base model alone, for other runs to take its answers over (`rundir.share_baseline`).

    Returns:
        The probes of the run.

    Raises:
        RetainError: as `run`.
    """
    return _kept(config, lambda: _Runner(plan(config), say, Watch()).base())


def _kept(config: RunConfig, work: Callable[[], Any]) -> Any:
    """What the work returns; a full disk as a line that says what to do."""
    try:
        return work()
    except RetainError:
        raise
    except Exception as error:
        if reason := disk_full(error):
            raise RunError(
                f"{config.directory}: the disk is full ({reason}). Free some and run the same command again: finished "
                "tasks, answers and whole checkpoints are kept, and it goes on from there."
            ) from error
        raise


class _Runner:
    """The state of one `run` call."""

    def __init__(self, planned: Plan, say: Say, watch: Watch) -> None:
        self.plan, self.config, self.say, self.watch = planned, planned.config, say, watch
        self.place = RunDirectory(self.config.directory)
        self.ranks = _ranks(bool(planned.train.get("use_cpu")))
        if not self.ranks.is_main_process:
            self.say = lambda line: None

    def base(self) -> list[ProbeInfo]:
        """Read what there is to read, and ask the base; the probes."""
        config, place = self.config, self.place
        # everything that can be wrong with the input is found before anything is written
        with self.ranks.main_process_first():  # one process fills the caches
            rows = read_rows(config, self.plan.train, self.say)
        self.tokenizer, self.tasks, self.old, self.notes = rows.tokenizer, rows.tasks, rows.old, rows.notes
        self.plan.stack.check_inputs(self.tokenizer)
        self.model: Any = None
        self.probes: list[Any] = []
        self.infos: list[Any] = []
        # under torchrun all processes train; the main one alone writes and probes, the others wait for it
        if self.ranks.is_main_process:
            self.probes, self.infos, questions = load_probes(config, self.tasks, self.tokenizer, self.say)
            for index, task in enumerate(self.tasks if config.monitor is not None else [], 1):
                self._monitor(index, task).with_tokenizer(self.tokenizer)
            data = check_directory(self.plan, rows, self.say)
            place.begin(config, data)
            for name, lines in ({} if config.private else questions).items():
                write_text(place.questions(name), lines)
            self._probe(BASE, 0)
        self.ranks.wait_for_everyone()
        return self.infos

    def run(self) -> Results:
        place = self.place
        self.base()
        methods = {
            m.name: m.config.model_dump(mode="json") | ({"strength": "auto"} if m.auto else {})
            for m in self.plan.stack.methods
        }
        for index, task in enumerate(self.tasks, 1):
            stage = self.plan.stages[index]
            finished = place.done(stage) is not None
            self.ranks.wait_for_everyone()  # all have looked before one marks it done
            if not finished:
                self._train(index, task, stage)
            if self.ranks.is_main_process:
                self._probe(stage, index)
                self._report(index, methods)
            self.ranks.wait_for_everyone()
        return load_results(place.path)

    # -- work --------------------------------------------------------------------------------------------
    def _model_of(self, index: int) -> Any:
        """The model after task `index` (0: the base), from memory or from the run directory."""
        if self.model is None or self.model[0] != index:
            from retain.models.load import load_stage

            folders = [self.place.task(stage) for stage in self.plan.stages[1 : index + 1]]
            self.model = (index, load_stage(self.config.model, folders, device=self._device()))
        return self.model[1]

    def _base(self) -> Any:
        """The base, beside the model that is in memory."""
        from retain.models.load import load_stage

        return load_stage(self.config.model, [], device=self._device())

    def _device(self) -> str:
        """Where the model trains, so that the baseline is probed there too."""
        import torch

        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if found is None or self.plan.train.get("use_cpu") else found.type

    def _probe(self, stage: str, index: int) -> None:
        """Ask the probes about the model of a stage, unless that was done."""
        path = self.place.items(stage)
        known = load_items(path) if path.is_file() else []
        there = {row["probe"] for row in known}
        some = self.config.probes.between == "tasks" and 0 < index < len(self.tasks)
        wanted = [p for p, info in zip(self.probes, self.infos) if info.role == "task" or not some]
        missing = [p for p in wanted if p.name not in there]
        if not missing:
            return
        from retain.training.watch import append, forget_looks

        rows = self._answers(stage, index, missing)
        forget_looks(self.place.metrics, stage, {p.name for p in missing})
        for info in self.infos:
            mine = [row for row in rows if row["probe"] == info.name]
            if mine:
                found = analysis.score(mine, info, self.config.probes.confidence)
                append(
                    self.place.metrics,
                    {"kind": "look", "stage": stage, "probe": info.name, "score": found.value}
                    | {"low": found.low, "high": found.high},
                )
        save_items(known + rows, path)  # last: it marks the looks as done
        self.place.asked(stage).unlink(missing_ok=True)

    def _answers(self, stage: str, index: int, probes: list[Any]) -> list[dict[str, Any]]:
        """What the model of a stage answers: kept before a number is made of it, and not asked for twice."""
        from retain.probes.asking import are_answers, ask
        from retain.probes.base import Origin, Subject
        from retain.training.watch import bar

        path = self.place.asked(stage)
        earlier = load_items(path) if path.is_file() else []
        if are_answers(earlier, probes):
            return earlier
        model = self._model_of(index)
        # a private run keeps no token of what the base was shown: it is asked anew
        folder = None if self.config.private else self.place.base_outputs
        origin = Origin(lambda: model if index == 0 else self._base(), folder)
        subject = Subject(model, self.tokenizer, origin=origin)
        with bar(transient=True) as progress:
            job = progress.add_task(f"probing {stage}", total=sum(len(p.items) for p in probes), note="")
            with self._precision():
                rows = ask(probes, subject, lambda n: progress.update(job, advance=n))
        if self.config.private:
            rows = [without_text(row) for row in rows]
        save_items(rows, path)
        return rows

    def _report(self, index: int, methods: dict[str, dict[str, Any]]) -> None:
        """Write what is known after task `index`, unless the next one is learned too: then that is about to come."""
        following = self.plan.stages[index + 1 : index + 2]
        if any(self.place.done(stage) is not None for stage in following):
            return
        from retain.report.page import write_report

        stages = self.plan.stages[: index + 1]
        results = outcome(self.config, self.place, stages, self.infos, methods, self.notes)
        save_results(results, self.place.path)
        write_report(self.place.path, lang=self.config.language)
        if following:
            self.watch.task(results)
            self.say(f"{self.config.task_names[index - 1]}: report so far in {self.place.path / 'report.html'}.")

    def _precision(self) -> Any:
        import torch

        half = self.config.probes.in_half(self.plan.train)
        return torch.autocast(self._device(), torch.bfloat16, enabled=half)

    def _train(self, index: int, task: Task, stage: str) -> None:
        from transformers import PrinterCallback
        from trl import SFTConfig

        from retain.methods.context import Run
        from retain.models import params
        from retain.models.load import parts, settled
        from retain.probes.base import texts_of_items
        from retain.training import checkpoint
        from retain.training.trainer import ContinualTrainer
        from retain.training.watch import Bar, Record

        folder = self.place.task(stage)
        own = {"output_dir": str(folder), "seed": self.config.seed + index, "disable_tqdm": True}
        if self.config.tasks[index - 1].on == "assistant" and task.form != "text":
            own["assistant_only_loss"] = True
        stack = Stack(build(self.config.methods))
        host: Any = ContinualTrainer
        args: Any
        if stack.writer is None:
            args = SFTConfig(**(self.plan.train | own))
        else:
            from retain.training.on_policy import ContinualSDFTTrainer, sdft_arguments

            host, args = ContinualSDFTTrainer, sdft_arguments(self.plan.train | own, stack.writer.fields())
        context = Run(
            folder,
            task=task.name,
            task_index=index,
            seed=self.config.seed,
            tokenizer=self.tokenizer,
            shared=self.place.path,
            new_rows=task.rows if hasattr(task.rows, "__len__") else None,
            say=self.say,
            private=self.config.private,
            avoid=texts_of_items(self.probes) if self.ranks.is_main_process else (),
        )
        last = checkpoint.newest(folder)
        bar = Bar(f"learning {task.name}")
        trainer = host(
            self._model_of(index - 1),
            args,
            train_dataset=task.rows,
            processing_class=self.tokenizer,
            methods=stack.methods,
            old=self.old,
            run=context,
            budget=self._budget(index, task, stack),
            callbacks=[Record(self.place.metrics, task.name), bar],
        )
        if self.config.monitor is not None:
            self._monitor(index, task).attach(trainer)
        trainer.remove_callback(PrinterCallback)
        if last:
            self.say(f"{task.name}: going on from {last.name}.")
        learning, total = params.counts(trainer.model)
        start = time.monotonic()
        try:
            outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            bar.close()
        trainer.release()
        new, replayed = trainer.rows_seen()
        summary = StepSummary(
            task=task.name,
            stage=stage,
            steps=outcome.global_step,
            new_rows=new,
            replay_rows=replayed,
            seconds=round(time.monotonic() - start, 1),
            trainable=learning,
            parameters=total,
            final_loss=next((float(e["loss"]) for e in reversed(trainer.state.log_history) if "loss" in e), None),
        )
        if self.ranks.is_main_process:
            self.place.save_task(stage, parts(trainer.model), summary.model_dump())
        self.model = (index, settled(trainer.model))

    def _budget(self, index: int, task: Task, stack: Stack) -> Any:
        """What holds a task to the budget, against the base of the whole run; None where there is nothing to hold.

        Strengths alone follow the usual budget, and nothing is taken back.
        """
        wanted = self.config.budget
        if wanted is None and not any(m.auto for m in stack.methods):
            return None
        from retain.training.budget import ForgettingBudget

        main = self.ranks.is_main_process
        return ForgettingBudget(
            on=budget_probes(self.config, self.probes, self.infos),
            tasks=[p for p, info in zip(self.probes, self.infos) if info.task == task.name],
            before=load_items(self.place.items(BASE)) if main else [],
            folder=self.place.budget,
            log=self.place.metrics,
            task=task.name,
            follow=index > 1,
            tokenizer=self.tokenizer,
            precision=self._precision,
            settle=wanted is not None,
            say=self.say,
            **(wanted or BudgetConfig()).model_dump(exclude={"on"}),
        )

    def _monitor(self, index: int, task: Task) -> Any:
        """What watches the training of a task: against the base of the whole run, in the run's own records."""
        from retain.training.monitor import ForgettingMonitor

        assert self.config.monitor is not None
        mine = [p for p, info in zip(self.probes, self.infos) if info.task == task.name]
        return ForgettingMonitor(
            tasks=mine,
            folder=self.place.path / "monitor",
            log=self.place.metrics,
            task=task.name,
            follow=index > 1,
            tokenizer=self.tokenizer,
            say=self.say,
            looked=self.watch.look,
            **self.config.monitor.model_dump(),
        )


def _ranks(use_cpu: bool) -> Any:
    """The processes of this run: one, or those that torchrun or `accelerate launch` started."""
    from accelerate import PartialState

    # a long time limit, as the others wait while one process probes; torchrun ends them when one fails
    return PartialState(cpu=use_cpu, timeout=datetime.timedelta(hours=12))


def load_run(directory: str | Path, stage: str | None = None, task: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a run, after its last task or after `stage`; adapters are merged, bottlenecks stay on.

    With `task`, the model as it was right after that task, taken out of the model of the stage: for methods that keep
    what a task learned apart from what later ones did (`packnet`).

    Raises:
        RunError: not a run directory, a stage that is not finished, or a task that cannot be taken out of it.
    """
    from retain.models import ownership
    from retain.models.load import load_model, load_stage, load_tokenizer

    place = RunDirectory(directory)
    config = place.read_config()
    stages = [BASE] + [stage_name(i, name) for i, name in enumerate(config.task_names, 1)]
    if stage is not None and stage not in stages:
        raise RunError(f"{directory}: no stage '{stage}'. Stages: {', '.join(stages)}.")
    upto = stages.index(stage) if stage else len(stages) - 1
    learned = config.task_names[:upto]
    if task is not None and task not in learned:
        raise RunError(f"{directory}: no task '{task}' up to {stages[upto]}. Tasks: {', '.join(learned) or 'none'}.")
    for name in stages[1 : upto + 1]:
        if place.done(name) is None:
            raise RunError(f"{directory}: stage '{name}' is not finished. Run the same command again to go on.")
    model = load_stage(config.model, [place.task(name) for name in stages[1 : upto + 1]], merged=True)
    if task is not None:
        base, _ = load_model(config.model, tokenizer=False)
        model = ownership.select(model, base, place.path, learned.index(task) + 1, upto)
    return model, load_tokenizer(config.model.name, config.model.revision)


def base_of_run(directory: str | Path, device: str) -> Any:
    """The model that a run began with.

    Raises:
        RunError: not a run directory.
    """
    from retain.models.load import load_stage

    return load_stage(RunDirectory(directory).read_config().model, [], device=device)
