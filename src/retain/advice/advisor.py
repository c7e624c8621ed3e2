"""From data and a model to a configuration with its reasons: what can be measured is, the rest goes by the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.advice import recipes
from retain.advice.facts import Facts, Request, Say, gathered
from retain.advice.recipes import Choice
from retain.advice.scenario import Scenario
from retain.advice.similarity import Similarity
from retain.advice.writing import document
from retain.config import ModelConfig, RunConfig, parse
from retain.errors import ConfigError

if TYPE_CHECKING:
    from retain.advice.trial import Trial
    from retain.estimate import Estimate


@dataclass(frozen=True)
class Advice:
    """What was found and what is advised.

    Args:
        request, scenario: what it goes by.
        ranking: recipes that fit, the advised one first.
        methods: their names in order, each with its settings.
        model, train: how weights are held, and the settings of the training.
        tasks: settings of every task.
        others: `private`, `old`, `budget` and `output`, each with its reason.
        notes: what was measured, and what not, one sentence each.
        similarity, estimate, trial: as far as they were made.
    """

    request: Request
    scenario: Scenario
    ranking: list[str]
    methods: list[tuple[str, list[Choice]]]
    model: list[Choice]
    train: list[Choice]
    tasks: list[dict[str, Any]]
    others: list[tuple[str, Any, Choice | None]]
    notes: list[str] = field(default_factory=list)
    similarity: Similarity | None = None
    estimate: Estimate | None = None
    trial: Trial | None = None

    @property
    def choices(self) -> list[Choice]:
        """Every setting with its reason, in the order of the configuration."""
        asked = [choice for _, _, choice in self.others if choice is not None]
        return [*asked, *self.model, *(c for _, choices in self.methods for c in choices), *self.train]

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return {
            "model": {"name": self.request.model} | _plain(self.model),
            "tasks": [dict(task) for task in self.tasks],
            "methods": [{name: _plain(choices)} for name, choices in self.methods],
            "train": _plain(self.train),
        } | {key: value for key, value, _ in self.others}

    def config(self) -> RunConfig:
        """The configuration, checked."""
        return parse(self.values, "advice")

    def text(self, more: Sequence[str] = ()) -> str:
        """The configuration as commented YAML, which reads as `values`.

        Args:
            more: paragraphs for the comment on top, such as the table of a pilot.
        """
        head = [
            f"Advised: {self.ranking[0]}. Every setting stands under its reason and, in brackets, where that is from; "
            "all of them are starting points. Check with `retain plan`, then `retain run` this file.",
            *self.notes,
            *more,
        ]
        return document(head, self.tasks, (self.request.model, self.model), self.methods, self.train, self.others)

    def with_recipe(self, name: str) -> Advice:
        """The same for another recipe, which then comes first; what was estimated belongs to the earlier one."""
        ranking = [name, *(other for other in self.ranking if other != name)]
        return replace(self, ranking=ranking, estimate=None, trial=None, **_choices(name, self.scenario))


def advise(request: Request, say: Say = print) -> Advice:
    """Measure, choose, and check the configuration.

    Args:
        request: what a person says.
        say: told what is being done.

    Raises:
        RetainError: data or a model that cannot be used, or settings that cannot be.
    """
    from retain.inputs import load_probes, read_rows
    from retain.pipeline import plan

    if not request.data:
        raise ConfigError("advise: nothing to learn. Give --data with a file, a folder or a hub id.")
    facts = gathered(request, say)
    scenario = facts.scenario
    ranking = recipes.ordered(scenario)
    advice = Advice(
        request,
        scenario,
        ranking,
        tasks=facts.tasks,
        others=_others(request),
        notes=facts.notes,
        similarity=facts.similarity,
        **_choices(ranking[0], scenario),
    )
    config = advice.config()
    planned = plan(config)
    rows = read_rows(config, planned.train, lambda line: None)
    planned.stack.check_inputs(rows.tokenizer)
    trial = None
    quantised = config.model.quantize != "none"
    if request.trial and facts.measurable and not quantised:
        say("trying a few steps")
        trial = _tried(config, planned.train, rows, facts)
    from retain.estimate import estimate

    say("estimating memory and time")
    probes, infos, _ = load_probes(config, rows.tasks, rows.tokenizer, lambda line: None)
    found = estimate(planned, rows.tasks, rows.tokenizer, probes, rows.old, infos)
    return replace(
        advice, estimate=found, trial=trial, notes=[*facts.notes, *costs(found, trial, request.price, request.memory)]
    )


def costs(found: Estimate, trial: Trial | None, price: float | None, limit: float | None = None) -> list[str]:
    """Memory, time and cost in words, each with where it is from; `limit` in GB is what training may take."""
    from retain.report.wording import duration

    learning = sum(seconds for name, seconds in found.time.items() if name.startswith("learning"))
    total, how = found.seconds, "estimated"
    if trial is not None:
        work = found.tasks[0]
        usual = trial.seconds * min(1.0, work.usual.width / trial.width)  # a step takes as long as it has tokens
        total, how = total - learning + usual * sum(one.steps for one in found.tasks), "by a step that was tried"
    held = found.bytes if trial is None else trial.bytes
    sentences = [
        f"expected memory: {held / 1e9:.2g} GB on {found.device} "
        f"({'estimated' if trial is None else 'the most that a real step held'}), {found.free / 1e9:.2g} GB free here"
    ]
    if found.time:
        sentences.append(f"expected time here: {duration(total)} ({how}, probes included)")
        if price is not None:
            sentences.append(f"expected cost: {total / 3600 * price:.2g} at {price:g} an hour")
    if limit is not None and held > limit * 1e9:
        sentences.append(f"that is more than the {limit:g} GB given: take a smaller model, or shorter rows")
    if not found.fits:
        sentences.append(f"it will probably not fit; what helps: {'; '.join(found.advice)}")
    return sentences


def _tried(config: RunConfig, train: dict[str, Any], rows: Any, facts: Facts) -> Trial:
    from retain.advice.trial import tried
    from retain.models.load import load_model

    model, facts.model = facts.model, None
    if model is None or config.model != ModelConfig(name=config.model.name):
        model = None
        model, _ = load_model(config.model)
    return tried(config, dict(train), model, rows.tokenizer, rows.tasks[0].rows)


def _choices(name: str, scenario: Scenario) -> dict[str, Any]:
    return {
        "methods": recipes.method_choices(name, scenario),
        "model": recipes.model_choices(scenario),
        "train": recipes.train_choices(name, scenario),
    }


def _others(request: Request) -> list[tuple[str, Any, Choice | None]]:
    found: list[tuple[str, Any, Choice | None]] = []
    if request.private:
        why = "no text of your rows is written to the run directory; probes keep numbers only, and methods that would "
        why += "store rows are refused"
        found.append(("private", True, Choice("private", True, why, "as you said")))
    if request.old is not None and not request.private:
        why = "rows that stand for what the model could do before"
        found.append(("old", request.old, Choice("old", request.old, why, "as you said")))
    if request.lose_at_most is not None:
        why = "at most so much of the old abilities' scores is lost, kept to while training and made sure of afterwards"
        value = request.lose_at_most
        found.append(("budget", {"lose_at_most": value}, Choice("budget.lose_at_most", value, why, "as you said")))
    if request.output is not None:
        found.append(("output", request.output, None))
    return found


def _plain(choices: Sequence[Choice]) -> dict[str, Any]:
    return {choice.setting.rpartition(".")[2]: choice.value for choice in choices}


def write(text: str, path: Path, again: bool = False) -> None:
    """Write the configuration; a file that is there is left alone unless `again`.

    Raises:
        ConfigError: it is there, or cannot be written.
    """
    from retain.results import write_text

    if path.exists() and not again:
        raise ConfigError(f"{path}: is there already, and is not written over. Give another --output, or --force.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Give another --output.") from error
