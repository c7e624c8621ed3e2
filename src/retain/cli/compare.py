"""`retain compare`: sets of methods on the same tasks, finished runs, or any models, side by side."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path


def command(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="A YAML file, with --methods; or directories of finished runs; or models: starter, folders, runs, hub "
            "ids.",
            metavar="RUNS...",
        ),
    ],
    methods: Annotated[
        list[str], typer.Option("--methods", help="A set to run, NAME=METHODS; METHODS as in the YAML file.")
    ] = [],  # noqa: B006
    probes: Annotated[
        list[str], typer.Option("--probes", "-p", help="Ask all models these: a suite, a file or a folder; core else.")
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="At most this many items per probe, for models.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder of the comparison; runs/<name>-compare by default.")
    ] = None,
    set_: Annotated[list[str], typer.Option("--set", "-o", help="Override a setting of the YAML file.")] = [],  # noqa: B006
    lang: Annotated[str | None, typer.Option("--lang", help="Language: en or zh; that of the runs by default.")] = None,
) -> None:
    """Run sets of methods on the same tasks, take finished runs, or ask models the same, and say what was kept.

    The first set, run or model is the reference. Run the same command again to go on after a stop.

        retain compare run.yaml --methods 'naive=\\[lora]' --methods 'replay=\\[lora, replay: {fraction: 0.3}]'

        retain compare runs/one runs/two

        retain compare starter ./adapter ./other --probes core --limit 40
    """
    from pathlib import Path

    from retain.cli.common import console, language_of
    from retain.errors import ConfigError
    from retain.report.language import check, speaking

    check(lang or "en")
    out = console()
    of_runs = methods or any(Path(run).is_file() for run in runs)
    if not of_runs and (probes or not all((Path(run) / "results.json").is_file() for run in runs)):
        if set_:
            raise ConfigError("--set: models are asked as they are. Give a YAML file with --methods.")
        _models(runs, probes or ["core"], Path(output or "runs/compare"), limit, out, lang or "en")
        return
    for name, value in (("--probes", probes), ("--limit", limit)):
        if value:
            raise ConfigError(f"{name}: for models alone; a run brings its own. Set `probes:` in the YAML file.")
    if of_runs:
        if len(runs) > 1:
            raise ConfigError(f"compare: {', '.join(runs)} given. Give one YAML file with --methods, or directories.")
        folder, places = _run(runs[0], methods, output, set_, out)
        if os.environ.get("RANK", "0") != "0":
            return  # under torchrun every process comes here; one speaks and writes
    else:
        if set_:
            raise ConfigError("--set: finished runs stay as they are. Give a YAML file with --methods.")
        if len(runs) < 2:
            raise ConfigError("compare: 1 run given. Give at least two run directories, or a YAML file with --methods.")
        places = [Path(run) for run in runs]
        folder = Path(output or os.path.relpath(os.path.dirname(os.path.abspath(runs[0]))))
    from retain.report import compare, terminal

    with speaking(lang or language_of(places[0])):
        found = compare.load(places)
        out.print(terminal.standings([(s.label, s.results, s.numbers) for s in found]))
        out.print(compare.explained(found), style="dim", highlight=False, markup=False)
        out.print(f"Picture and table: {compare.write(found, folder)}", highlight=False, markup=False, soft_wrap=True)


def _models(names: list[str], sources: list[str], folder: Path, limit: int | None, out: Any, lang: str) -> None:
    """Ask models the same probes and print what the others lost of the first."""
    from functools import partial

    from retain.cli.common import probing, quiet_libraries, quietly
    from retain.measuring import compare_models
    from retain.report import terminal
    from retain.report.language import speaking
    from retain.results import load_results

    quiet_libraries()

    places = compare_models(names, sources, folder, limit, quietly(out), partial(probing, out), lang)
    found = [load_results(place) for place in places]
    with speaking(lang):
        for results in found:
            out.print(terminal.summary(results))
        if len(found) > 1:
            out.print(terminal.compare(found[0], found[1], *found[2:]))
    out.print(f"Report: {places[0] / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _run(path: str, methods: list[str], output: str | None, overrides: list[str], out: Any) -> tuple[Path, list[Path]]:
    """Carry out one run per set; the folder of the comparison and the directories in it."""
    from pathlib import Path

    from retain.cli.common import quiet_libraries
    from retain.comparison import method_sets, run_sets
    from retain.config import read

    config = read(path, overrides)
    folder = Path(output) if output else Path(f"{config.directory}-compare")
    quiet_libraries()
    sets = method_sets(config, methods, folder)
    run_sets(sets, lambda line: out.print(line, style="dim", highlight=False, markup=False))
    return folder, [own.directory for own in sets.values()]
