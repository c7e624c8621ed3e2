"""What a run comes to: the numbers of `results.json`, made from its directory."""

from __future__ import annotations

import datetime
import shlex
from typing import Any

from retain import analysis
from retain.config import RunConfig
from retain.drift import drift
from retain.errors import RunError
from retain.items import is_divergence
from retain.results import Budget, ProbeInfo, Results, Sequence, StepSummary, Thresholds, Totals, load_items
from retain.rundir import RunDirectory
from retain.totals import totals


def outcome(
    config: RunConfig,
    place: RunDirectory,
    stages: list[str],
    probes: list[ProbeInfo],
    methods: dict[str, dict[str, Any]],
    notes: list[str],
) -> Results:
    """The results of a run, or of its first tasks: then what a run of these alone comes to, and `ahead` the others.

    Args:
        stages: the base first, then one per task; all trained and probed.
        probes: those of all tasks.
        methods: settings of those that were at work, by name.
        notes: what was done to the rows.

    Raises:
        RunError: an item table that is not there or cannot be read.
    """
    confidence, thresholds = config.probes.confidence, Thresholds(**config.verdict.model_dump())
    names, ahead = config.task_names[: len(stages) - 1], config.task_names[len(stages) - 1 :]
    probes = [info for info in probes if info.task not in ahead]
    tables = {stage: load_items(place.items(stage)) for stage in stages}

    found = numbers(tables, probes, confidence, thresholds)
    measured = [n for n in names if any(i.task == n for i in probes)]
    rows = analysis.matrix(found["scores"], probes, names) if measured == names else []
    summaries = [place.done(stage) or {} for stage in stages[1:]]
    return Results(
        name=config.title,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=config.model.name,
        seed=config.seed,
        confidence=confidence,
        command=shlex.join(["retain", "run", str(place.config)]),
        old=_what_stood_for_old(config, place, methods),
        methods=methods,
        tasks=names,
        stages=stages,
        probes=probes,
        matrix=rows,
        sequence=analysis.sequence(rows) if rows else Sequence(**dict.fromkeys(Sequence.model_fields)),
        training=[StepSummary(**{k: v for k, v in s.items() if k != "kind"}) for s in summaries],
        notes=notes,
        thresholds=thresholds,
        ahead=ahead,
        budgets=_budgets(place, names),
        **found,
    )


def _budgets(place: RunDirectory, names: list[str]) -> list[Budget]:
    """What the budget of each task came to, where the run has one."""
    files = [place.budget / f"{name}.json" for name in names]
    try:
        return [Budget.model_validate_json(path.read_text(encoding="utf-8")) for path in files if path.is_file()]
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{place.budget}: damaged ({first}). Delete the folder of the run, and begin anew.") from None


def numbers(
    tables: dict[str, list[dict[str, Any]]], probes: list[ProbeInfo], confidence: float, thresholds: Thresholds
) -> dict[str, Any]:
    """What `Results` says of answers alone: scores, totals, changes, deltas by group, verdict and drift.

    Args:
        tables: stage → item rows of all probes, the base first; changes are those of the last stage.

    Raises:
        RunError: as `analysis.changes`.
    """

    def score(stage: str, info: ProbeInfo) -> Any:
        return analysis.score([r for r in tables[stage] if r["probe"] == info.name], info, confidence)

    stages = list(tables)
    first, last = tables[stages[0]], tables[stages[-1]]
    margins = thresholds.model_dump(include={"margin", "margin_nats"})
    settings = thresholds.model_dump(exclude={*margins})
    judged = [info for info in probes if not is_divergence(info)]  # a divergence is no ability: it begins at 0
    changes = analysis.changes(first, last, judged, confidence, **margins)
    differences = {stage: drift(first, tables[stage], probes, confidence) for stage in stages[1:]}
    return {
        "scores": {stage: {info.name: score(stage, info) for info in probes} for stage in stages},
        "totals": {stage: found for stage, rows in tables.items() if (found := _totals(rows, probes))},
        "group_deltas": analysis.group_deltas(tables, judged, confidence),
        "changes": changes,
        "verdict": analysis.verdict(changes, judged, first, last, confidence=confidence, **settings),
        "drift": {stage: found for stage, found in differences.items() if found is not None},
    }


def _totals(rows: list[dict[str, Any]], probes: list[ProbeInfo]) -> dict[str, Totals]:
    """Of the probes that have other numbers than their score."""
    found = {info.name: totals([r for r in rows if r["probe"] == info.name]) for info in probes}
    return {name: of_probe for name, of_probe in found.items() if of_probe.numbers}


def _what_stood_for_old(config: RunConfig, place: RunDirectory, methods: dict[str, Any]) -> str:
    if any((place.path / "buffer").glob("demonstrations-0*.parquet")):
        return f"rows the model wrote like those given by the user: {config.old}"
    if any((place.path / "buffer").glob("on-policy-*.parquet")):
        whose = f"given by the user ({config.old})" if config.old else "of earlier tasks"
        return f"prompts {whose}, answered anew by the model; stored answers where it was not right"
    listed = [source["data"] for source in methods.get("replay", {}).get("sources", [])]
    found = [f"rows given by the user: {config.old}"] if config.old else []
    if files := [data for data in listed if data not in ("old", "self", "tasks")]:
        found.append(f"rows replayed from {', '.join(files)}")
    if (place.path / "buffer" / "self.parquet").is_file() and (not config.old or "self" in listed):
        found.append("text the model wrote itself before training")
    return "; ".join(found) or "none: no method needed old data"
