"""Tables for the terminal, as Rich renderables. Text from models and data is never read as Rich markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from retain.report import budget, language, top, wording
from retain.report.language import say
from retain.report.wording import CONCLUSION_TONE, Tone
from retain.results import Results

STYLES: dict[Tone, str] = {"good": "green", "bad": "yellow", "unknown": "bright_black"}


def _plain(text: str, limit: int = 160) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= limit else line[: limit - 1] + "…")


def summary(results: Results) -> RenderableType:
    """The verdict, the three numbers and one line per probe of a run."""
    words, tone = wording.headline(results)
    end = say("sentence.end")
    text = Text(words + end + (" " if end == "." else ""), style=f"bold {STYLES[tone]}")
    text.append(top.sentence(results), style="not bold default")
    parts: list[RenderableType] = [Panel(text, title=_plain(results.name, 60), border_style=STYLES[tone])]
    numbers = Table.grid(padding=(0, 2))
    for big in wording.three(results):
        value = Text(big.value, style=f"bold {STYLES[big.tone]}")
        numbers.add_row(Text(big.label, style="bold"), value, Text(big.interval), Text(big.note, style="dim"))
    if results.changes:
        parts.append(numbers)
    for said in budget.sentences(results):
        word = "budget.met" if said.met else "budget.not_met"
        style = STYLES["good" if said.met else "bad"]
        parts.append(Text.assemble((say(word), f"bold {style}"), "  ", said.words))
    parts.append(_probes(results))
    return Group(*parts)


def _probes(results: Results) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(say("terminal.probe"), overflow="fold")
    measured_once = not results.changes
    heads = ("terminal.before", "terminal.after", "terminal.change", "terminal.lost_gained")
    for head in ("terminal.score", "terminal.items") if measured_once else heads:
        table.add_column(say(head), justify="right", no_wrap=True)
    if measured_once:
        scores = results.scores.get(results.stages[0], {}) if results.stages else {}
        for info in results.probes:
            if (found := scores.get(info.name)) is not None:
                value = f"{wording.score(info, found.value)} {wording.score_interval(info, found)}"
                table.add_row(_plain(info.name), value, str(info.items))
        return table
    table.add_column(say("terminal.conclusion"), no_wrap=True)
    for role in ("task", "reference"):
        for info, change in wording.changes_of(results, role):
            table.add_row(
                _plain(info.name),
                wording.score(info, change.before.value),
                wording.score(info, change.after.value),
                f"{wording.difference(info, change.difference.value)} {wording.unit(info)} "
                f"{wording.difference_interval(info, change.difference)}",
                f"{change.lost}/{change.gained}",
                Text(language.name("conclusion", change.conclusion), STYLES[CONCLUSION_TONE[change.conclusion]]),
            )
        table.add_section()
    return table


def compare(results_a: Results, results_b: Results, *more: Results) -> Table:
    """Runs side by side, one column each: learned, kept and lost with their intervals, and the verdict.

    Raises:
        RunError: the runs start from different models or share no probe.
    """
    runs = [results_a, results_b, *more]
    for other in runs[1:]:
        wording.check_comparable(results_a, other)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column("")
    for results in runs:
        table.add_column(_plain(results.name, 40), overflow="fold")
    for words in (wording.learned, wording.kept, wording.lost):
        numbers = [words(results) for results in runs]
        cells = [
            Text.assemble((big.value, f"bold {STYLES[big.tone]}"), f"\n{big.interval}" if big.interval else "")
            for big in numbers
        ]
        table.add_row(Text(numbers[0].label), *cells)
    verdicts = [wording.headline(results) for results in runs]
    table.add_row(Text(say("terminal.verdict")), *(Text(words, style=STYLES[tone]) for words, tone in verdicts))
    return table


def models(results: Sequence[Results]) -> Table:
    """Models side by side, a column each, a row per probe; the last one's change from the first, paired over items.

    Args:
        results: of n − 1 models, all set against the same first one.
    """
    first, last = results[0], results[-1]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("probe", overflow="fold")
    labels = [first.stages[0].partition("-")[2], *(each.name for each in results)]
    for label in labels:
        table.add_column(_plain(label, 24), justify="right", overflow="fold")
    table.add_column(_plain(f"{labels[-1]} − {labels[0]}", 48), justify="right", overflow="fold")
    for info, change in wording.changes_of(last, "reference"):
        scores = [
            first.scores[first.stages[0]][info.name],
            *(each.scores[each.stages[-1]][info.name] for each in results),
        ]
        shown = f"{wording.difference(info, change.difference.value)} {wording.unit(info)}"
        table.add_row(
            _plain(info.name),
            *(wording.score(info, score.value) for score in scores),
            Text.assemble(
                (shown, STYLES[CONCLUSION_TONE[change.conclusion]]),
                f" {wording.difference_interval(info, change.difference)}",
            ),
        )
    return table


def standings(runs: Sequence[tuple[str, Results, Sequence[wording.BigNumber]]]) -> Table:
    """Runs one under the other: label with verdict, then their numbers with intervals.

    Args:
        runs: label, results, and numbers of the same kinds for all.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column(say("terminal.run"), overflow="fold", ratio=1)
    for big in runs[0][2]:
        table.add_column(_plain(big.label.lower(), 40), overflow="fold")
    for label, results, numbers in runs:
        words, tone = wording.headline(results)
        cells = [Text.assemble((big.value, f"bold {STYLES[big.tone]}"), f"\n{big.interval}") for big in numbers]
        table.add_row(Text.assemble((_plain(label, 40).plain, "bold"), ("\n" + words, STYLES[tone])), *cells)
    return table


def questions(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Table:
    """Prompts with the answer of each model beside them.

    Args:
        prompts: n prompts.
        answers: label of a model → its n answers, in the order of the columns ("base", "naive", "retained").
    """
    table = Table(header_style="bold", show_lines=True)
    table.add_column("question", overflow="fold", style="dim")
    for label in answers:
        table.add_column(_plain(label, 40), overflow="fold")
    for place, prompt in enumerate(prompts):
        table.add_row(_plain(prompt), *(_plain(given[place]) for given in answers.values()))
    return table
