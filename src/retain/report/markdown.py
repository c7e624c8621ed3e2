"""`report.md`: the report as text, for a pull request or a terminal; ten flipped items instead of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from retain.report import changed, judged, wording
from retain.report import flips as flip
from retain.results import Change, ProbeInfo, Results, StepSummary, write_text

EXAMPLES = 10


def cell(text: object, limit: int = 300) -> str:
    """Any text on one line, safe inside a Markdown table: pipes, HTML and markup are escaped."""
    line = " ".join(str(text).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_]|(?<=\])\()", r"\\\1", line)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def change_row(info: ProbeInfo, change: Change) -> list[str]:
    """One probe: name, before, after, difference with interval, Holm p, detectable, lost, gained, conclusion."""
    counted = change.lost + change.gained + change.kept > 0  # a perplexity has no right and wrong items
    return [
        info.name,
        f"{wording.score(info, change.before.value)} {wording.score_interval(info, change.before)}",
        f"{wording.score(info, change.after.value)} {wording.score_interval(info, change.after)}",
        f"{wording.difference(info, change.difference.value)} {wording.unit(info)} "
        f"{wording.difference_interval(info, change.difference)}",
        wording.probability(change.p_holm),
        f"{wording.difference(info, change.detectable, sign=False)} {wording.unit(info)}",
        str(change.lost) if counted else "–",
        str(change.gained) if counted else "–",
        change.conclusion,
    ]


def compare_rows(runs: Sequence[tuple[str, Results]]) -> list[list[str]]:
    """One row per run: label, learned, kept, lost (each with its interval), verdict."""
    rows = []
    for label, results in runs:
        words = [f"{n.value} ({n.interval})" if n.interval else n.value for n in wording.three(results)]
        rows.append([label, *words, wording.headline(results)[0]])
    return rows


def render(results: Results, flips: flip.Flips, compare: Sequence[tuple[str, Results]] = ()) -> str:
    """The text of `report.md`.

    Args:
        results: the run.
        flips: its items before and after; the first `EXAMPLES` lost or gained ones are shown.
        compare: (label, results) of runs to set beside it.
    """
    percent = f"{100 * results.confidence:g} %"
    parts = [
        f"# {cell(results.name)}",
        f"**{wording.headline(results)[0]}.** {cell(wording.sentence(results), 2000)}",
    ]
    if left := wording.progress(results):
        parts.insert(1, f"*{cell(left[0].upper() + left[1:], 2000)}.*")
    numbers = [[n.label, n.value, n.interval, n.note] for n in wording.three(results)]
    parts.append(table(["", "value", "interval", ""], numbers))
    if results.verdict and results.verdict.lost_over_threshold:
        parts.append("Lost a large part of: " + ", ".join(map(cell, results.verdict.lost_over_threshold)) + ".")
    if compare:
        parts.append("## Side by side")
        head = ["run", "learned", "kept", "lost", "verdict"]
        parts.append(table(head, compare_rows([(results.name, results), *compare])))
    parts.append("## Every probe")
    head = [
        "probe",
        "before",
        "after",
        "difference",
        "p (Holm)",
        "detectable",
        "lost",
        "gained",
        "conclusion",
    ]
    for role, title in (("task", "New tasks"), ("reference", "Old abilities")):
        pairs = wording.changes_of(results, role)
        for group in dict.fromkeys(info.group for info, _ in pairs):
            parts.append(f"### {title}: {cell(group)}")
            parts.append(table(head, [change_row(info, c) for info, c in pairs if info.group == group]))
    if not results.changes:
        scores = results.scores.get(results.stages[0], {}) if results.stages else {}
        rows = [
            [
                info.name,
                info.group,
                f"{wording.score(info, s.value)} {wording.score_interval(info, s)}",
                info.items,
            ]
            for info in results.probes
            if (s := scores.get(info.name)) is not None
        ]
        parts.append(table(["probe", "group", "score", "items"], rows))
    else:
        parts.append(
            f"Intervals are {percent}, paired over the items. *Detectable*: the smallest true change that the probe "
            "would have shown four times out of five by p (Holm), even if no other probe changed. *Lost* and *gained* "
            "count items."
        )
    if results.tasks:
        parts.append("## Tasks")
        matrix = [
            [stage, *("–" if v is None else f"{v:.3g}" for v in row)]
            for stage, row in zip(results.stages, results.matrix)
        ]
        parts.append(table(["after", *map(cell, results.tasks)], matrix))
        known = [(name, getattr(results.sequence, name)) for name in wording.SEQUENCE_WORDS]
        lines = [(*wording.SEQUENCE_WORDS[name], f"{value:.3f}") for name, value in known if value is not None]
        if lines:
            parts.append(table(["number", "value", "meaning"], [[name, value, why] for name, why, value in lines]))
        if len(results.tasks) > 1 and results.group_deltas:
            parts.append("Change of old abilities by group since the base, in points (negative is worse):")
            head = ["", *map(cell, results.group_deltas)]
            parts.append(table(head, [[stage, *cells] for stage, cells in judged.groups(results)]))
    parts += _judged(results)
    parts += _changed(results)
    parts += _examples(flips)
    parts += _how(results)
    return "\n\n".join(parts) + "\n"


def _judged(results: Results) -> list[str]:
    if not (found := judged.rows(results)):
        return []
    parts = ["## The verdict in numbers", table(["number", "value", "interval", "meaning"], found)]
    parts.append(judged.thresholds(results))
    if lost := judged.probes(results):
        head = ["old probe", *(name.lower() for name, _ in judged.LOST.values())]
        parts.append(table(head, [[name, *cells] for name, cells in lost]))
    return parts


def _changed(results: Results) -> list[str]:
    parts = []
    if agreed := changed.agreed(results):
        parts.append(table(["against the base", "value", "interval", "meaning"], agreed))
    if moved := changed.moved(results):
        parts.append(table(["number", "before", "after", "difference", "interval", "items"], moved))
    return ["## How the answers changed", *parts, changed.NOTE] if parts else []


def _examples(flips: flip.Flips) -> list[str]:
    changed = [item for item in flips.items if item["outcome"] in ("lost", "gained", "worse", "better")]
    if not changed:
        return []
    lost = [item for item in changed if item["outcome"] in ("lost", "worse")]
    gained = [item for item in changed if item["outcome"] in ("gained", "better")]
    # Half of each, so that a run which gained a lot does not hide what it lost.
    few = min(len(lost), max(EXAMPLES // 2, EXAMPLES - len(gained)))
    chosen = lost[:few] + gained[: EXAMPLES - few]
    rows = [
        [item[key] for key in ("outcome", "probe", "item", "prompt", "reference", "before", "after")] for item in chosen
    ]
    counts = ", ".join(f"{count} {word}" for word, count in flips.counts.items())
    return [
        "## Items that changed",
        f"{len(chosen)} examples ({counts}); `report.html` has them all.",
        table(["outcome", "probe", "item", "prompt", "right answer", "before", "after"], rows),
    ]


def _how(results: Results) -> list[str]:
    rows: list[Sequence[object]] = [
        ["model", results.model],
        ["old data", results.old],
        ["seed", results.seed],
        ["made", results.created],
    ]
    for name, settings in results.methods.items():
        rows.append([f"method {name}", ", ".join(f"{key} = {value}" for key, value in settings.items()) or "defaults"])
    parts = ["## How it was run", table(["", ""], rows)]
    if results.training:
        head = ["task", "steps", "new rows", "replay rows", "time", "trainable", "final loss"]
        parts.append(
            table(
                head,
                [
                    [
                        s.task,
                        s.steps,
                        s.new_rows,
                        s.replay_rows,
                        wording.duration(s.seconds),
                        trainable(s),
                        loss(s),
                    ]
                    for s in results.training
                ],
            )
        )
    if results.notes:
        parts.append("The rows:\n\n" + "\n".join(f"- {cell(note)}" for note in results.notes))
    fence = "`" * (3 + max((len(run) for run in re.findall(r"`+", results.command)), default=0))
    parts.append(f"Run it again:\n\n{fence}sh\n{results.command}\n{fence}")
    return parts


def trainable(step: StepSummary) -> str:
    """Trainable parameters of a `StepSummary`, with their share of all."""
    share = 100 * step.trainable / step.parameters if step.parameters else 0.0
    return f"{step.trainable:,} of {step.parameters:,} ({share:.2g} %)"


def loss(step: StepSummary) -> str:
    """Final loss of a `StepSummary`, or a dash."""
    return wording.number(step.final_loss, 3)


def write(directory: Path, text: str) -> Path:
    """Write `report.md` into a run directory and return its path."""
    path = Path(directory) / "report.md"
    write_text(path, text)
    return path
