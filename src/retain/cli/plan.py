"""`retain plan`: check a configuration without loading weights, and say what would happen and what it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from retain.config import RunConfig
    from retain.data.tasks import Task
    from retain.estimate import Estimate
    from retain.results import ProbeInfo

#: Share of answers that change in a usual fine-tuning without being worse; the sure loss is shown for it, too.
FLIPS = 0.05
BUDGET = "Largest loss on old abilities: 1%, 1pt or 0.01 is one point. Exit with 1 when nothing fits it."
KEEP = "What the budget is on: a suite, probe file or task, as in probes.reference; all that is there by default."


def command(
    config: Annotated[str | None, typer.Argument(help="A YAML file. Without one, give --task.")] = None,
    task: Annotated[list[str], typer.Option("--task", "-t", help="Data to learn.")] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option("--model", "-m", help="starter, a folder, or a hub id.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Run directory.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="A recipe by name; see `retain methods`.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help=BUDGET)] = None,
    keep: Annotated[list[str], typer.Option("--keep", help=KEEP)] = [],  # noqa: B006
    set_: Annotated[list[str], typer.Option("--set", "-o", help="Override a setting.")] = [],  # noqa: B006
) -> None:
    """Check a configuration, its data and its run directory; estimate memory and time; show all settings.

    Nothing is trained or written, and no weights are loaded.
    """
    from retain.cli.common import console, quiet_libraries
    from retain.config import dump

    settings = configuration(config, task, model, output, set_, preset, budget, keep)
    quiet_libraries()
    from retain.estimate import estimate
    from retain.inputs import load_probes, read_rows
    from retain.pipeline import check_directory, plan

    out = console()
    notes: list[str] = []
    with out.status("reading the data, rehearsing a step …"):
        planned = plan(settings)
        rows = read_rows(settings, planned.train, notes.append)
        tokenizer, tasks = rows.tokenizer, rows.tasks
        planned.stack.check_inputs(tokenizer)
        probes, infos, _ = load_probes(settings, tasks, tokenizer, notes.append)
        check_directory(planned, rows, notes.append)
        found = estimate(planned, tasks, tokenizer, probes, rows.old, infos)
    names = [method.name for method in planned.stack.methods]
    share = found.trainable / found.parameters
    about = {
        "model": f"{settings.model.name}, {_count(found.parameters)} parameters, {_count(found.trainable)} "
        f"of them trained ({share:.1%})",
        "methods": ", ".join(names) or "none (plain fine-tuning)",
        "stages": " → ".join(planned.stages),
        "directory": str(settings.directory),
    }
    for name, text in about.items():
        out.print(f"[bold]{name:<10}[/bold]", end="")
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    out.print()
    out.print(_tasks(found, tasks))
    said = [note for note in notes if not note.startswith("budget: ")]  # that is shown below
    for note in [*said, *found.notes]:
        out.print(f"  {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    _show_budget(out, settings, probes, infos)
    out.print()
    out.print(_needs(found))
    if not found.fits:
        out.print(
            f"[bold yellow]It will probably not fit.[/bold yellow] {_gib(found.bytes)} needed, about, and "
            f"{_gib(found.free)} free. What helps, in this order:",
            highlight=False,
        )
        for number, step in enumerate(found.advice, 1):
            out.print(f"  {number}. {step}", markup=False, highlight=False)
    out.print("\n[dim]All settings:[/dim]")
    print(dump(settings))


def _show_budget(out: Any, settings: RunConfig, probes: Sequence[Any], infos: Sequence[ProbeInfo]) -> None:
    """What a budget asks of the probes, and what they can be sure of."""
    from retain.functional.budget import items_needed
    from retain.functional.certify import certifiable
    from retain.inputs import budget_probes
    from retain.items import is_divergence

    if (budget := settings.budget) is None:
        return
    kept = [probe.info("reference") for probe in budget_probes(settings, probes, infos)]
    sizes = [info.items for info in kept if not info.is_perplexity and not is_divergence(info)]
    texts = sum(info.items for info in kept if info.is_perplexity)
    limits = (
        [f"at most {100 * budget.lose_at_most:g} points lost, on {sum(sizes)} items of {len(sizes)} probes"]
        if sizes
        else []
    )
    limits += [f"at most {budget.lose_at_most_nats:g} nats per token, on {texts} texts"] if texts else []
    lines = [f"{'; '.join(limits)} ({budget.confidence:.0%} confidence)"]
    changes = {0.0: "no answer changes", FLIPS: f"{FLIPS:.0%} of them change, as many for the better"}
    for flips, word in changes.items() if sizes else ():
        sure = 100 * certifiable(sizes, budget.confidence, flips)
        needed = items_needed(budget.lose_at_most, budget.confidence, flips, sizes)
        enough = "enough" if needed <= sum(sizes) else f"{needed:,} items needed"
        lines.append(f"if {word}: a loss above {sure:.2g} points is ruled out; {enough}")
    out.print()
    for head, line in zip(("budget", *[""] * len(lines)), lines):
        out.print(f"[bold]{head:<10}[/bold]", end="")
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _tasks(found: Estimate, tasks: list[Task]) -> Table:
    """Rows, steps and tokens of every task."""
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("task", overflow="fold")
    for head in ("to learn", "to test", "replayed", "steps", "tokens a step", "longest row"):
        table.add_column(head, justify="right")
    for work, task in zip(found.tasks, tasks):
        rows = "a stream" if work.rows is None else f"{work.rows:,}"
        numbers = (len(task.test_rows), work.replayed, work.steps, work.tokens, work.largest.width)
        table.add_row(work.name, rows, *(f"{number:,}" if number else "–" for number in numbers))
    return table


def _needs(found: Estimate) -> Table:
    """Memory and time, part by part, side by side."""
    from itertools import zip_longest

    from rich.table import Table

    from retain.report.wording import duration

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(f"memory ({found.device})", overflow="fold")
    table.add_column("about", justify="right", no_wrap=True)
    table.add_column("   time", overflow="fold")
    table.add_column("about", justify="right", no_wrap=True)
    memory = [(name, _gib(size)) for name, size in found.memory.items()]
    time = [(f"   {name}", duration(_rounded(seconds))) for name, seconds in found.time.items()]
    for left, right in zip_longest(memory, time, fillvalue=("", "")):
        table.add_row(*left, *right)
    table.add_section()
    total = duration(_rounded(found.seconds)) if found.time else "not known"
    fits = "green" if found.fits else "yellow"
    table.add_row("in all", f"[{fits}]{_gib(found.bytes)}[/{fits}]", "   in all", total, style="bold")
    table.add_row("free here", _gib(found.free), "", "", style="dim")
    return table


def _gib(size: float) -> str:
    """Bytes as "0.52 GiB", "3.4 GiB" or "120 GiB"."""
    gib = size / 2**30
    return f"{gib:.2f} GiB" if gib < 1 else f"{gib:.1f} GiB" if gib < 100 else f"{gib:,.0f} GiB"


def _rounded(seconds: float) -> float:
    """Seconds to the two digits that an estimate deserves; below a minute to the next five."""
    if seconds < 60:
        return max(5, 5 * round(seconds / 5))
    return float(f"{seconds:.2g}")


def _count(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def configuration(
    config: str | None,
    tasks: list[str],
    model: str | None,
    output: str | None,
    overrides: list[str],
    preset: str | None = None,
    budget: str | None = None,
    keep: Sequence[str] = (),
) -> RunConfig:
    """The configuration of a file, or of options alone, with overrides.

    Raises:
        ConfigError: neither a file nor a task, or a bad setting.
    """
    from retain.config import override, parse, read
    from retain.errors import ConfigError
    from retain.presets import filled
    from retain.settings import share

    extra = [f"output={output}"] if output else []
    extra += [f"model.name={model}"] if model else []
    if budget is not None:
        try:
            extra.append(f"budget.lose_at_most={share(budget)}")
        except ValueError as error:
            raise ConfigError(f"--budget {budget}: {error}.") from None
    extra += [f"budget.on={json.dumps(list(keep))}"] if keep else []
    if config is not None:
        if tasks:
            raise ConfigError("--task: tasks stand in the YAML file. Give one or the other.")
        return read(config, [*overrides, *extra], preset)
    if not tasks:
        raise ConfigError("nothing to learn: give a YAML file, or --task with a file, a folder or a hub id.")
    values = filled({"tasks": [{"data": t} for t in tasks], "model": {}, "preset": preset})
    return parse(override(values, [*overrides, *extra]), "options")
