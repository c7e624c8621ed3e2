"""`retain merge`: several models, or adapters on one base, made into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from retain.models.merge import Merged


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders of models or LoRA adapters, finished runs, hub ids; with --library names of experts.",
            metavar="MODELS...",
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="Folder to write; must not exist yet.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="linear, slerp, task, ties, dare, stock or interpolate.")
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option("--weights", help="One number per model, such as 0.7,0.3; for interpolate one, α.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The model that all began as; for adapters it is known.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare: share of the changed entries that stays.")] = None,
    scale: Annotated[float | None, typer.Option(help="task, ties, dare: multiplies the merged change.")] = None,
    seed: Annotated[int, typer.Option(help="dare: of what is dropped.")] = 0,
    form: Annotated[
        str | None, typer.Option("--as", help="adapter or model; adapters of one base become an adapter.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of a merged adapter; by default the sum.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of a merged model.")] = "2GB",
    library: Annotated[str | None, typer.Option(help="Folder of a library; MODELS may be its experts.")] = None,
    probes: Annotated[
        list[str],
        typer.Option("--probe", "-p", help="Ask the base, the models and the merge: a suite, file or folder."),
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items per probe.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder of the comparison; <to>-compare by default.")
    ] = None,
) -> None:
    """Merge models into one and, with --probe, measure what the merge kept of each.

    retain merge runs/medical runs/legal --to merged

    retain merge ./one ./two --method ties --base starter --density 0.2 --to merged --probe core
    """
    from retain.cli.common import console, quiet_libraries, quietly
    from retain.errors import ConfigError

    out = console()
    if not probes and (limit is not None or output is not None):
        raise ConfigError("--limit, --output: are for --probe. Give one, or leave them out.")
    numbers = _numbers(weights)
    quiet_libraries()
    from retain.measuring import open_probes
    from retain.models.merge import merge

    sources = [_of_library(library, name) if library else name for name in models]
    if probes:
        open_probes(probes, limit, lambda line: None)  # a mistake in them is said before the merge, not after it

    @contextmanager
    def watched(what: str, total: int) -> Iterator[Any]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        count = DownloadColumn() if what == "bytes" else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
        with Progress(*columns, transient=True, console=out) as bar:
            job = bar.add_task("merging", total=total)
            yield lambda n: bar.update(job, advance=n)

    done = merge(
        sources, to, method, numbers, base, density, scale, seed, form, rank, shard_size=shard_size, watched=watched
    )
    _say(done, rank, quietly(out))
    out.print(f"{done.form.capitalize()}: {to}", highlight=False, markup=False, soft_wrap=True)
    if probes:
        _measured(sources, done, probes, limit, Path(output or f"{to}-compare"), out)


def _numbers(text: str | None) -> list[float] | None:
    from retain.errors import ConfigError

    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights: '{text}' given. Give numbers with commas between them, one per model, such as 0.7,0.3."
        ) from None


def _of_library(folder: str, name: str) -> str:
    """The folder of an expert; other names stay."""
    from retain.experts.library import ExpertLibrary

    library = ExpertLibrary(folder)
    return str(library.path(name)) if name in library else name


def _say(done: Merged, rank: int | None, say: Any) -> None:
    kept = done.kept
    if kept is None:
        say(f"{done.size / 1e6:.0f} MB of weights." + (f" Base: {done.base}." if done.base else ""))
    elif kept.share < 1:
        more = "" if rank else " A higher --rank keeps more, --as model all."
        say(
            f"Rank {kept.rank} on {done.base} keeps {100 * kept.share:.1f} % of the squared norm of the merged change; "
            f"least in {kept.worst}, {100 * kept.least:.1f} %.{more}"
        )
    else:
        say(f"Rank {kept.rank} on {done.base}: exactly the merged change.")


def _measured(
    models: Sequence[str], done: Merged, probes: Sequence[str], limit: int | None, folder: Path, out: Any
) -> None:
    """Ask the base, where there is one, the models and the merge the same, and show them side by side."""
    from functools import partial

    from retain.cli.common import probing, quietly
    from retain.measuring import compare_models
    from retain.report import terminal
    from retain.results import load_results

    names = [*([done.base] if done.base else []), *models, str(done.folder)]
    places = compare_models(names, probes, folder, limit, quietly(out), partial(probing, out))
    found = [load_results(place) for place in places]
    out.print(terminal.models(found))
    out.print(f"Report: {places[-1] / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
