"""`report.md`: the report as text, for a pull request or a terminal; ten flipped items instead of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from retain.report import budget, changed, judged, language, top, totals, wording
from retain.report import flips as flip
from retain.report.language import say
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
        wording.detectable(info, change),
        str(change.lost) if counted else "–",
        str(change.gained) if counted else "–",
        language.name("conclusion", change.conclusion),
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
    parts = [f"# {cell(results.name)}"]
    if left := wording.progress(results):
        parts.append(f"*{cell(left[0].upper() + left[1:], 2000)}{say('sentence.end')}*")
    parts.append(f"**{cell(wording.headline(results)[0], 2000)}{say('sentence.end')}**")
    parts += top_lines(results)
    numbers = [[n.label, n.value, n.interval, n.note] for n in wording.three(results)]
    parts.append(table(["", say("md.value"), say("md.interval"), ""], numbers))
    if compare:
        parts.append(f"## {say('side.title')}")
        head = [say("side.run"), *(n.label.lower() for n in wording.three(results)), say("side.verdict")]
        parts.append(table(head, compare_rows([(results.name, results), *compare])))
    parts += _budget(results)
    parts += _probes(results)
    parts += _totals(results, compare)
    parts += _tasks(results)
    parts += _judged(results)
    parts += _changed(results)
    parts += _examples(flips)
    parts += _how(results)
    return "\n\n".join(parts) + "\n"


def top_lines(results: Results) -> list[str]:
    """The three facts, what was lost in large part, and the verdict in a sentence: one paragraph or list each."""
    facts = [
        f"- **{n.label}{say('list.colon')}{n.value}** {cell(n.interval)}  \n  {cell(n.note)}"
        for n in top.facts(results)
    ]
    parts = ["\n".join(fact.rstrip() for fact in facts)] if facts else []
    if large := top.fallen(results):
        names = [f"- {cell(fallen.words)}{say('list.semicolon')}{fallen.doubt}" for fallen in large]
        alarm = say("facts.alarm", percent=wording.percent(f"{100 * results.thresholds.alarm:g}"))
        parts.append(f"**{alarm}**\n\n" + "\n".join(names))
    if said := budget.sentences(results):
        head = say("budget.met" if all(one.met for one in said) else "budget.not_met")
        parts.append(f"**{head}**\n\n" + "\n".join(f"- {cell(one.words, 2000)}" for one in said))
    return [*parts, cell(top.sentence(results), 2000)]


def _budget(results: Results) -> list[str]:
    parts = []
    for block in budget.blocks(results):
        parts += [f"### {cell(block.task)}"] if len(results.budgets) > 1 else []
        parts += [
            cell(block.words, 2000),
            table(_head("numbers.number", "numbers.value", "md.interval", "numbers.meaning"), block.numbers),
        ]
        parts += [table([_small(head) for head in block.heads], block.points)] if block.points else []
        if block.advice:
            parts.append(
                f"{say('budget.helps')}{say('list.colon')}\n\n" + "\n".join(f"- {cell(a, 2000)}" for a in block.advice)
            )
    return [f"## {say('budget.title')}", *parts, say("budget.limits")] if parts else []


def _probes(results: Results) -> list[str]:
    parts = [f"## {say('md.every')}"]
    if not results.changes:
        scores = results.scores.get(results.stages[0], {}) if results.stages else {}
        rows = [
            [
                info.name,
                language.name("group", info.group),
                f"{wording.score(info, s.value)} {wording.score_interval(info, s)}",
                info.items,
            ]
            for info in results.probes
            if (s := scores.get(info.name)) is not None
        ]
        return [*parts, table(_head("probes.probe", "probes.group", "probes.score", "probes.count"), rows)]
    head = _head("probes.probe", "probes.before", "probes.after", "probes.difference", "probes.p", "probes.detectable")
    head += _head("outcome.lost", "outcome.gained", "probes.conclusion")
    for role in ("task", "reference"):
        pairs = wording.changes_of(results, role)
        for group in dict.fromkeys(info.group for info, _ in pairs):
            title = say(f"role.{role}") + say("list.colon") + language.name("group", group)
            parts.append(f"### {cell(title)}")
            parts.append(table(head, [change_row(info, c) for info, c in pairs if info.group == group]))
    return [*parts, say("md.explained", percent=wording.confidence(results))]


def _totals(results: Results, compare: Sequence[tuple[str, Results]]) -> list[str]:
    found = totals.shown(results, compare)
    parts = []
    if found.numbers:
        head = [*_head("probes.probe", "totals.number"), *map(_small, found.heads)]
        parts.append(table(head, [[probe, number, *cells] for probe, number, cells in found.numbers]))
    if found.classes:
        head = [*_head("probes.probe", "totals.class", "totals.count"), *map(_small, found.words)]
        parts.append(table(head, [[one.probe, one.name, one.items, *one.cells] for one in found.classes]))
    return [f"## {say('totals.title')}", *parts, say("totals.note")] if parts else []


def _head(*keys: str) -> list[str]:
    """Words for the head of a table; only what begins a sentence elsewhere is written small."""
    return [_small(say(key)) for key in keys]


def _small(text: str) -> str:
    return text if text.startswith(("p ", "F1")) else text[0].lower() + text[1:]


def _tasks(results: Results) -> list[str]:
    if not results.tasks:
        return []
    stages = [["–" if v is None else f"{v:.3g}" for v in row] for row in results.matrix]
    rows = [[stage, *values] for stage, values in zip(results.stages, stages)]
    parts = [f"## {say('md.tasks')}", table([say("md.after"), *map(cell, results.tasks)], rows)]
    if lines := wording.sequence(results):
        rows = [[name, value, why] for name, why, value in lines]
        parts.append(table(_head("numbers.number", "numbers.value", "numbers.meaning"), rows))
    if len(results.tasks) > 1 and results.group_deltas:
        parts.append(say("md.groups"))
        head = ["", *(cell(language.name("group", group)) for group in results.group_deltas)]
        parts.append(table(head, [[stage, *cells] for stage, cells in judged.groups(results)]))
    return parts


def _judged(results: Results) -> list[str]:
    if not (found := judged.rows(results)):
        return []
    head = _head("numbers.number", "numbers.value", "md.interval", "numbers.meaning")
    parts = [f"## {say('numbers.title')}", table(head, found)]
    parts.append(judged.thresholds(results))
    if lost := judged.probes(results):
        head = [say("numbers.old_probe").lower(), *(name.lower() for name in judged.lost_words())]
        parts.append(table(head, [[name, *cells] for name, cells in lost]))
    return parts


def _changed(results: Results) -> list[str]:
    parts = []
    if agreed := changed.agreed(results):
        parts.append(table([say(f"changed.{k}") for k in ("against", "value", "interval", "meaning")], agreed))
    if moved := changed.moved(results):
        head = ("number", "before", "after", "difference", "interval", "items")
        parts.append(table([say(f"changed.{k}") for k in head], moved))
    return [f"## {say('changed.title')}", *parts, say("changed.note")] if parts else []


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
        [
            say(f"outcome.{item['outcome']}"),
            *(item[key] for key in ("probe", "item", "prompt", "reference", "before", "after")),
        ]
        for item in chosen
    ]
    counts = say("list.comma").join(
        say("md.counted", n=count, word=say(f"outcome.{word}")) for word, count in flips.counts.items()
    )
    head = _head("items.outcome", "items.probe", "md.item", "md.prompt", "items.right_answer", "items.before")
    return [
        f"## {say('md.changed')}",
        say("md.examples", n=len(chosen), counts=counts),
        table([*head, say("items.after")], rows),
    ]


def _how(results: Results) -> list[str]:
    rows: list[Sequence[object]] = [
        [say("how.model").lower(), results.model],
        [say("md.old_data"), language.quoted(results.old)],
        [say("how.seed").lower(), results.seed],
        [say("how.made").lower(), results.created],
    ]
    for name, settings in results.methods.items():
        said = ", ".join(f"{key} = {value}" for key, value in settings.items())
        rows.append([say("md.method", name=name), said or say("md.defaults")])
    parts = [f"## {say('how.title')}", table(["", ""], rows)]
    if results.training:
        head = _head(
            "how.task", "how.steps", "how.new_rows", "how.replay_rows", "how.time", "how.trainable", "how.loss"
        )
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
        notes = "\n".join(f"- {cell(language.quoted(note))}" for note in results.notes)
        parts.append(f"{say('md.rows')}\n\n{notes}")
    fence = "`" * (3 + max((len(run) for run in re.findall(r"`+", results.command)), default=0))
    parts.append(f"{say('md.again')}\n\n{fence}sh\n{results.command}\n{fence}")
    return parts


def trainable(step: StepSummary) -> str:
    """Trainable parameters of a `StepSummary`, with their share of all."""
    share = 100 * step.trainable / step.parameters if step.parameters else 0.0
    return say("how.trainable_of", some=step.trainable, all=step.parameters, share=f"{share:.2g}")


def loss(step: StepSummary) -> str:
    """Final loss of a `StepSummary`, or a dash."""
    return wording.number(step.final_loss, 3)


def write(directory: Path, text: str) -> Path:
    """Write `report.md` into a run directory and return its path."""
    path = Path(directory) / "report.md"
    write_text(path, text)
    return path
