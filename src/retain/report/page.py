"""`report.html`: one file that opens anywhere, asks the network for nothing, and says the verdict first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template

from retain.errors import RunError
from retain.report import budget, changed, figures, judged, language, markdown, top, totals, wording
from retain.report import flips as flip
from retain.report.canvas import INK, Picture
from retain.report.language import say
from retain.results import Change, ProbeInfo, Results, load_metrics, load_results, write_text

ROLES = ("task", "reference")


def write_report(directory: Path, compare: Sequence[Path] = (), lang: str = "en") -> Path:
    """Write `report.html`, `report.md` and `figures/*.svg` into a run directory.

    Args:
        directory: the directory of a run that has learned a task; the page says when others are to come.
        compare: directories of other runs on the same base model and probes (plain fine-tuning, say); the
            report then sets them beside this one.
        lang: language of all its words: "en" or "zh".

    Returns:
        The path of `report.html`.

    Raises:
        ConfigError: a language that is not there.
        RunError: a directory has no results, a file in it is damaged, or a run cannot be compared.
    """
    directory = Path(directory)
    results = load_results(directory)
    beside = others(directory, results, compare)
    metrics = load_metrics(directory)
    with language.speaking(lang):
        pictures = figures.draw(results, metrics, [(label, r, load_metrics(place)) for label, place, r in beside])
        for picture in pictures:
            write_text(directory / "figures" / f"{picture.name}.svg", picture.svg.replace(INK, "#767676"))
        flips = flip.collect(directory, results, beside)
        named = [(label, theirs) for label, _, theirs in beside]
        markdown.write(directory, markdown.render(results, flips, named))
        write_text(directory / "report.html", render(directory, results, pictures, flips, named))
    return directory / "report.html"


def others(directory: Path, results: Results, compare: Sequence[Path]) -> list[tuple[str, Path, Results]]:
    """Label, directory and results of the runs to compare with this one; labels are unique.

    Raises:
        RunError: one is the run itself, has no results, or starts from another model or asks other probes.
    """
    found: list[tuple[str, Path, Results]] = []
    taken = {results.name}
    for place in map(Path, compare):
        if place.resolve() == directory.resolve():
            raise RunError(f"compare: {place} is the run itself. Give the directory of another run.")
        theirs = load_results(place)
        wording.check_comparable(results, theirs)
        label = theirs.name if theirs.name not in taken else f"{theirs.name} ({place.name})"
        while label in taken:
            label += "'"
        taken.add(label)
        found.append((label, place, theirs))
    return found


def render(
    directory: Path,
    results: Results,
    pictures: Sequence[Picture],
    flips: flip.Flips,
    compare: Sequence[tuple[str, Results]] = (),
) -> str:
    """The text of `report.html`; every value is escaped by the template engine."""
    words, tone = wording.headline(results)
    runs = [(results.name, results), *compare]
    return template("report.html.j2").render(
        results=results,
        headline=words,
        tone=tone,
        sentence=top.sentence(results),
        progress=wording.progress(results),
        facts=top.facts(results),
        fallen=top.fallen(results),
        alarm=wording.percent(f"{100 * results.thresholds.alarm:g}"),
        left=top.left(results),
        budgets=budget.blocks(results),
        budget_said=budget.sentences(results),
        percent=wording.confidence(results),
        sections=[_section(results, role) for role in ROLES if wording.changes_of(results, role)],
        once=_once(results),
        side_by_side=side_by_side(runs) if compare else None,
        sequence=wording.sequence(results),
        judged=judged.rows(results),
        thresholds=judged.thresholds(results),
        lost_items=judged.probes(results),
        lost_words=judged.lost_words(),
        groups=judged.groups(results),
        agreed=changed.agreed(results),
        moved=changed.moved(results),
        totals=totals.shown(results, compare),
        pictures={picture.name: picture for picture in pictures},
        flips=flips,
        flip_data={"items": flips.items, "others": flips.others, "words": flip.words()},
        methods=[(name, pairs(settings)) for name, settings in results.methods.items()],
        training=[(s, wording.duration(s.seconds), markdown.trainable(s), markdown.loss(s)) for s in results.training],
        environment=_environment(directory),
        config=_read(directory / "run.yaml"),
        model_words=_files_word(directory),
        zip=zip,
    )


def template(name: str) -> Template:
    """A template of this folder; every value that it shows is escaped."""
    return _templates(language.tag()).get_template(name)


@cache
def _templates(tag: str) -> Environment:
    """Those of a language, each compiled once: a run writes its report after every task."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"t": say, "name": language.name, "quoted": language.quoted, "lang": tag}
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    return environment


def _tick(info: ProbeInfo, change: Change, scale: float) -> dict[str, float]:
    """Where the interval of a difference lies on a line from −100 (worse) to 100 (better)."""
    sign = 1 if info.higher_is_better else -1
    bounds = sorted(sign * bound / scale for bound in (change.difference.low, change.difference.high))
    value = sign * change.difference.value / scale
    low, high, value = (round(100 * min(1.0, max(-1.0, x)), 1) for x in (*bounds, value))
    return {"low": low, "high": high, "value": value, "width": max(round(high - low, 1), 1.0)}


def _row(info: ProbeInfo, change: Change, scale: float) -> dict[str, Any]:
    row = dict(
        zip(
            ("name", "before", "after", "difference", "p", "detectable", "lost", "gained", "conclusion"),
            markdown.change_row(info, change),
        )
    )
    return row | {
        "asked": say("probes.items", metric=language.name("metric", info.metric), n=change.items),
        "before": wording.score(info, change.before.value),
        "before_interval": wording.score_interval(info, change.before),
        "after": wording.score(info, change.after.value),
        "after_interval": wording.score_interval(info, change.after),
        "difference": f"{wording.difference(info, change.difference.value)} {wording.unit(info)}",
        "interval": wording.difference_interval(info, change.difference),
        "tick": _tick(info, change, scale),
        "tone": wording.CONCLUSION_TONE[change.conclusion],
        "band": language.name("band", change.band),
        "retention": wording.percent(wording.number(change.retention, 0)),
    }


def _section(results: Results, role: str) -> dict[str, Any]:
    """One table: the probes of a role, by group, each group with its means."""
    pairs = wording.changes_of(results, role)
    units = {wording.unit(info) for info, _ in pairs}
    scales = {
        name: max(
            (abs(b) for i, c in pairs if wording.unit(i) == name for b in (c.difference.low, c.difference.high)),
            default=1.0,
        )
        or 1.0
        for name in units
    }
    groups = []
    for group in dict.fromkeys(info.group for info, _ in pairs):
        inside = [(info, change) for info, change in pairs if info.group == group]
        shares = [change for info, change in inside if wording.is_share(info)]
        mean = None
        if len(shares) > 1:
            before, after = (sum(v) / len(shares) for v in zip(*((c.before.value, c.after.value) for c in shares)))
            ends = {"before": f"{100 * before:.1f}", "after": f"{100 * after:.1f}"}
            mean = say("probes.mean", **ends, change=wording.points(after - before))
        rows = [_row(info, change, scales[wording.unit(info)]) for info, change in inside]
        groups.append({"name": language.name("group", group), "mean": mean, "rows": rows})
    return {"title": say(f"role.{role}"), "role": role, "groups": groups}


def _once(results: Results) -> list[dict[str, Any]]:
    """Scores of a model that was only measured, not trained."""
    if results.changes or not results.stages:
        return []
    scores = results.scores.get(results.stages[0], {})
    return [
        {
            "name": info.name,
            "group": language.name("group", info.group),
            "metric": language.name("metric", info.metric),
            "items": info.items,
            "score": wording.score(info, scores[info.name].value),
            "interval": wording.score_interval(info, scores[info.name]),
            "chance": wording.score(info, info.chance),
        }
        for info in results.probes
        if info.name in scores
    ]


def side_by_side(runs: Sequence[tuple[str, Results]]) -> dict[str, Any]:
    """The three numbers of every run, and the change of every probe that they share."""
    heads = []
    for label, results in runs:
        words, tone = wording.headline(results)
        heads.append({"label": label, "headline": words, "tone": tone, "numbers": wording.three(results)})
    found = [{change.probe: change for change in results.changes} for _, results in runs]
    rows = []
    for info in runs[0][1].probes:
        cells = [
            (
                f"{wording.difference(info, changes[info.name].difference.value)} {wording.unit(info)}",
                wording.difference_interval(info, changes[info.name].difference),
                wording.CONCLUSION_TONE[changes[info.name].conclusion],
            )
            if info.name in changes
            else None
            for changes in found
        ]
        if any(cells):
            rows.append((info.name, cells))
    return {"runs": heads, "rows": rows}


def pairs(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names with their values."""
    if not isinstance(settings, dict):
        return [
            (
                prefix or "value",
                json.dumps(settings, ensure_ascii=False) if settings is None else str(settings),
            )
        ]
    rows = []
    for key, value in settings.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        rows += pairs(value, name) if isinstance(value, dict) and value else [(name, str(value))]
    return rows


def _environment(directory: Path) -> list[tuple[str, str]]:
    text = _read(directory / "env.json")
    try:
        return pairs(json.loads(text)) if text else []
    except json.JSONDecodeError as error:
        raise RunError(f"{directory / 'env.json'}: not JSON ({error}). Delete it or run again.") from error


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _files_word(directory: Path) -> list[str]:
    """Files of the run directory that a reader may want next, where they exist."""
    names = ("results.json", "run.yaml", "env.json", "metrics.jsonl", "probes", "tasks", "report.md")
    return [name for name in names if (directory / name).exists()]
