"""`retain search`: strengths, shares, ranks and learning rates for this model and this data, found by trying."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retain.cli.common import loss_option

if TYPE_CHECKING:
    from retain.advice.search import Search, Units


def command(
    config: Annotated[str, typer.Argument(help="A YAML file, as for `retain run`.")],
    over: Annotated[
        list[str],
        typer.Option("--over", help="What is varied: methods.NAME.SETTING or train.SETTING = a range or a list."),
    ] = [],  # noqa: B006
    mode: Annotated[
        str, typer.Option(help="tpe; random; grid; or raise: all strengths times two until enough is kept.")
    ] = "tpe",
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many runs; 20 by default.")] = None,
    points: Annotated[int, typer.Option(min=2, help="Of a grid: values of each range.")] = 5,
    lose_at_most: Annotated[float | None, loss_option("--lose-at-most", "Choose by this loss; raise until it.")] = None,
    learn_at_least: Annotated[
        float | None, typer.Option("--learn-at-least", help="Of raise: stop where less is learned.")
    ] = None,
    prune: Annotated[bool, typer.Option(help="End runs early that are behind another one beyond doubt.")] = True,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Keep the weights of runs that another one beats, too.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="So many processes at once.")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="For several machines: a file or the address of a database (sqlite:///…).")
    ] = None,
    confirm: Annotated[int, typer.Option(min=0, help="Run the chosen one again with so many other seeds.")] = 0,
    output: Annotated[str | None, typer.Option("--output", help="Folder; runs/<name>-search by default.")] = None,
    set_: Annotated[list[str], typer.Option("--set", "-o", help="Override a setting of the YAML file.")] = [],  # noqa: B006
) -> None:
    """Try settings on your model and data, and show what is learned against what is lost.

    Every try is an ordinary run; the base is asked once. Without --over the strengths, the replay share, the LoRA rank
    and the learning rate of the file are varied. Run the same command again to go on after a stop.

        retain search run.yaml --over methods.distill.strength=0.1..10:log --over methods.lora.r=4,8,16

        retain search run.yaml --mode raise --lose-at-most 0.02
    """
    from retain.cli.common import console, quiet_libraries, quietly

    _check_words(mode, over, workers, confirm, learn_at_least)
    quiet_libraries()
    from retain.advice.search import prepare
    from retain.advice.search_result import conclude

    search = _search(
        config, over, output, set_, mode=mode, trials=trials, points=points, storage=storage, prune=prune,
        keep_all=keep_all, lose_at_most=lose_at_most, learn_at_least=learn_at_least,
    )  # fmt: skip
    out = console()
    if mode == "raise":
        out.print("varied: all strengths together, times two each time", highlight=False)
    for one in search.over:
        out.print(f"varied: {one}", highlight=False, markup=False, soft_wrap=True)
    if mode == "grid":
        out.print(f"{len(search.grid())} runs", highlight=False)
    units = prepare(search, quietly(out))
    try:
        _carry_out(search, units, workers, out)
    except KeyboardInterrupt:
        conclude(search, units, 0, quietly(out))  # what there is, for a look before it goes on
        raise
    _show(search, conclude(search, units, confirm, quietly(out)), out)


def _check_words(mode: str, over: list[str], workers: int, confirm: int, learn: float | None) -> None:
    from importlib.util import find_spec

    from retain.errors import ConfigError, unknown

    modes = ("tpe", "random", "grid", "raise")
    if mode not in modes:
        raise ConfigError(unknown("--mode", mode, modes))
    if mode == "raise" and over:
        raise ConfigError("--over: not with --mode raise, which varies all strengths together. Leave one of them out.")
    if mode == "raise" and workers > 1:
        raise ConfigError(
            "--workers: not with --mode raise, where each trial follows from the one before. Leave it out."
        )
    if learn is not None and mode != "raise":
        raise ConfigError("--learn-at-least: has no effect without --mode raise. Leave it out.")
    if confirm == 1:
        raise ConfigError("--confirm: one run has no interval. Give 2 or more.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("search: not under torchrun; a run is one process here. Start it alone, with --workers.")
    if find_spec("optuna") is None:
        raise ConfigError("search: needs Optuna. Install it: pip install 'retain-llm[search]'.")


def _search(path: str, over: list[str], output: str | None, overrides: list[str], **own: Any) -> Search:
    from pathlib import Path

    from retain.advice.search import Search
    from retain.advice.search_space import read_over, usual
    from retain.config import read
    from retain.pipeline import plan

    config = read(path, overrides)
    plan(config)
    folder = Path(output) if output else Path(f"{config.directory}-search")
    varied = [] if own["mode"] == "raise" else read_over(over, config) if over else usual(config)
    return Search(config, varied, folder, **own)


def _carry_out(search: Search, units: Units, workers: int, out: Any) -> None:
    from retain.advice.search import work
    from retain.cli.common import quietly
    from retain.report.language import speaking
    from retain.report.search import amount, state

    if workers > 1:
        from retain.advice.search_workers import in_parallel
        from retain.cli.common import quiet_libraries
        from retain.training.watch import bar

        with bar(transient=True, console=out) as progress:
            job = progress.add_task("searching", total=None, note="")

            def show(ended: int, total: int) -> None:
                progress.update(job, completed=ended, total=total)

            in_parallel(search, units, workers, show, quiet_libraries)
        return

    def told(trial: Any) -> None:
        numbers = f"learned {amount(trial.learned, units.learned)}, lost {amount(trial.lost, units.lost)}"
        with speaking("en"):
            line = f"trial {trial.number}: {numbers if trial.state == 'finished' else state(trial)}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)

    work(search, units, quietly(out), told)


def _show(search: Search, found: Any, out: Any) -> None:
    from retain.errors import RunError
    from retain.report import search as page
    from retain.report.language import speaking

    with speaking(search.config.language):
        out.print(page.shown(found))
        for line in page.conclusion(found):
            out.print(line, style="dim", highlight=False, markup=False)
    if found.best is None:
        reason = next((t.reason for t in found.trials if t.state == "failed"), "")
        error = RunError(f"{search.folder}: no trial finished{f' ({reason})' if reason else ''}.")
        error.exit_code = 1
        raise error
    for label, name in (("Page", "search.html"), ("Run the recommended one", "best.yaml")):
        line = f"{label}: {'retain run ' if name.endswith('yaml') else ''}{search.folder / name}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)
