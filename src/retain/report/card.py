"""A model card for the hub: metadata that the hub reads (`model-index`), what was trained, what was kept, the limits.

Written with huggingface_hub's own classes, so that the hub reads back what is meant.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from retain.report import language, markdown, wording
from retain.report.language import say
from retain.results import Change, Estimate, ProbeInfo, Results, write_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ["retain", "continual-learning", "catastrophic-forgetting"]


def write(results: Results, path: Path, lang: str = "en") -> Path:
    """Write the card of a run and return its path.

    Args:
        lang: language of the text; the metadata are the same in all.

    Raises:
        ConfigError: a language that is not there.
    """
    with language.speaking(lang):
        write_text(path, render(results))
    return path


def render(results: Results) -> str:
    """The card: YAML metadata between `---` lines, then Markdown. Folders of this machine are left out of it."""
    from huggingface_hub import ModelCardData

    base = _public(results.model)
    measured = metrics(results)
    data = ModelCardData(
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
        eval_results=measured or None,
        model_name=results.name,
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    parts = [f"# {markdown.cell(results.name)}", *_trained(results), *_result(results), *_limits(results)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def metrics(results: Results) -> list[EvalResult]:
    """`EvalResult`s: every probe after training, with its interval and the score before; then the means.

    Shares are from 0 to 1; a loss is positive. What is not a number in `results.json` is left out.
    """
    found = [_measured(results, info, change) for r in ("task", "reference") for info, change in _of(results, r)]
    means = (("mean gain on the new tasks", "learned", 1), ("mean loss on old abilities", "difference", -1))
    for name, field, sign in means:
        estimate: Estimate | None = getattr(results.verdict, field, None)
        if estimate is not None:
            low, high = sorted((sign * estimate.low, sign * estimate.high))
            kind = "learned" if sign == 1 else "forgetting"
            found.append(_result_of(results, kind, name, kind, sign * estimate.value, {"low": low, "high": high}))
    return found


def _measured(results: Results, info: ProbeInfo, change: Change) -> EvalResult:
    said = {"low": change.after.low, "high": change.after.high, "before": change.before.value, "items": change.items}
    return _result_of(results, info.name, info.name, info.metric.replace(" ", "_"), change.after.value, said)


def _result_of(results: Results, kind: str, name: str, metric: str, value: float, said: dict[str, float]) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^\w.-]+", "-", kind).strip("-") or "probe",
        dataset_name=name,
        metric_type=metric,
        metric_value=value,
        metric_name=metric.replace("_", " "),
        metric_args={"confidence": results.confidence, **said},
    )


def _of(results: Results, role: str) -> list[tuple[ProbeInfo, Change]]:
    return wording.changes_of(results, role)


def _public(text: str) -> str:
    """Text without the folders of this machine: the last part of each absolute path stays."""
    return re.sub(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\,;]+[/\\])*([^\s/\\,;]+)", r"\1", text)


def _trained(results: Results) -> list[str]:
    tasks = say("list.comma").join(map(markdown.cell, results.tasks)) or say("how.none")
    methods = say("list.comma").join(results.methods)
    lines = [
        say("card.trained_line", model=markdown.cell(_public(results.model)), tasks=tasks),
        say("card.methods", methods=methods) if methods else say("card.no_methods"),
        say("card.old_data", old=markdown.cell(_public(language.quoted(results.old)))),
    ]
    steps = [
        say(
            "card.step",
            task=markdown.cell(s.task),
            steps=s.steps,
            new=s.new_rows,
            replay=s.replay_rows,
            trainable=markdown.trainable(s),
        )
        for s in results.training
    ]
    return [f"## {say('card.trained')}", "\n".join(lines), "\n".join(f"- {step}" for step in steps)][
        : 3 if steps else 2
    ]


def _result(results: Results) -> list[str]:
    parts = [f"## {say('card.result')}", *markdown.top_lines(results)]
    if rows := [markdown.change_row(info, change) for r in ("task", "reference") for info, change in _of(results, r)]:
        head = [say(f"probes.{key}") for key in ("probe", "before", "after", "difference", "conclusion")]
        parts.append(markdown.table(head, [[*row[:4], row[-1]] for row in rows]))
    return parts


def _limits(results: Results) -> list[str]:
    old = _of(results, "reference")
    shares = [(info, change) for info, change in old if wording.is_share(info)]
    blind = [info.name for info, change in shares if change.detectable > 1]
    seen = [100 * change.detectable for _, change in shares if change.detectable <= 1]
    unsure = [change.probe for _, change in old if change.conclusion == "cannot tell" and change.probe not in blind]
    items, probes = sum(change.items for _, change in old), say("count.probes", n=len(old))
    lines = [say("card.limit_items", items=items, probes=probes)]
    lines.append(say("card.limit_seed", seed=results.seed, percent=wording.confidence(results)))
    if seen:
        least, most = wording.number(min(seen)), wording.number(max(seen))
        lines.append(say("card.limit_detectable", least=least, most=most))
    if blind:
        lines.append(say("card.limit_nothing", names=markdown.cell(wording.listed(blind))))
    if unsure:
        lines.append(say("card.limit_open", names=markdown.cell(wording.listed(unsure))))
    if progress := wording.progress(results):
        lines.append(markdown.cell(progress[0].upper() + progress[1:]) + say("sentence.end"))
    if results.budgets:
        lines.append(say("card.limit_budget"))
    lines.append(say("card.limit_license"))
    return [f"## {say('card.limits')}", "\n".join(f"- {line}" for line in lines)]
