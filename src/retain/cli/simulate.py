"""`retain simulate`: a forgetting curve from settings, or a run's own curve and where it leads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from retain.report.canvas import Picture


def command(
    run: Annotated[str | None, typer.Argument(help="Directory of a run that was watched; settings otherwise.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Parameters of the model, such as 7e9.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the new data; 1 by default.")] = None,
    similarity: Annotated[float | None, typer.Option(help="Of new data to old, 0 to 1; 0 by default.")] = None,
    intensity: Annotated[float | None, typer.Option(help="1 = usual training; grows with the learning rate.")] = None,
    base_rate: Annotated[float | None, typer.Option(help="Share lost in a first pass over unrelated data.")] = None,
    ceiling: Annotated[float | None, typer.Option(help="Largest share that can be lost; 1 by default.")] = None,
    steps_per_epoch: Annotated[int | None, typer.Option(min=1, help="Shows optimizer steps, too.")] = None,
    at: Annotated[list[float], typer.Option("--at", help="RUN: step to forecast; may be repeated.")] = [],  # noqa: B006
    law: Annotated[str | None, typer.Option(help="RUN: saturating or power; both by default.")] = None,
    measure: Annotated[str | None, typer.Option(help="RUN: what of the looks; forgetting where there is any.")] = None,
    confidence: Annotated[float | None, typer.Option(help="RUN: of the intervals; 0.95 by default.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Draw the curve: a file .svg or .html.")] = None,
) -> None:
    """Show how forgetting grows with training: by settings, or fitted to a run and forecast with an interval.

    retain simulate --parameters 7e9 --epochs 3 --similarity 0.4

    retain simulate runs/one --at 2000
    """
    from pathlib import Path

    from retain.errors import ConfigError

    path = Path(output) if output else None
    if path and path.suffix not in (".svg", ".html"):
        raise ConfigError(f"--output: '{output}' given. Give a file that ends in .svg or .html.")
    settings = {
        "parameters": parameters, "epochs": epochs, "similarity": similarity, "intensity": intensity,
        "base_rate": base_rate, "ceiling": ceiling,
    }  # fmt: skip
    given = {name: value for name, value in settings.items() if value is not None}
    if run is None:
        _only("RUN", at=at, law=law, measure=measure, confidence=confidence)
        if parameters is None:
            raise ConfigError("simulate: nothing given. Give --parameters, such as 7e9, or the directory of a run.")
        drawn = _settings(given, steps_per_epoch)
    else:
        _only("settings", **given, steps_per_epoch=steps_per_epoch)
        drawn = _run(Path(run), at, law, measure, 0.95 if confidence is None else confidence)
    if path:
        from retain.report.dynamics import write

        write(drawn, path)
        typer.echo(f"Picture: {path}")


def _only(whose: str, **options: Any) -> None:
    """An option that would have no effect is a mistake."""
    from retain.errors import ConfigError

    if used := [name for name, value in options.items() if value not in (None, [])]:
        flag = "--" + used[0].replace("_", "-")
        what = "a run. Give its directory" if whose == "RUN" else "a curve by settings. Leave it, or the run, out"
        raise ConfigError(f"{flag}: is for {what}.")


def _settings(given: dict[str, float], steps_per_epoch: int | None) -> Picture:
    """Print the curve of settings; its picture."""
    import numpy as np

    from retain.cli.common import console
    from retain.errors import ConfigError
    from retain.functional import dynamics
    from retain.report.dynamics import picture

    epochs = given.pop("epochs", 1.0)
    if not 0 < epochs < float("inf"):
        raise ConfigError(f"--epochs: {epochs:g} given. Give a number above 0.")
    passes = np.linspace(0, epochs, 101)
    lost = dynamics.simulate(passes, **given)
    named = {name: value for name, value in given.items() if name != "ceiling"}
    out = console()
    out.print(
        f"sensitivity of {given['parameters']:.3g} parameters {dynamics.sensitivity(given['parameters']):.2f}; "
        f"at first {dynamics.loss_rate(**named):.1%} of old abilities lost per epoch",
        highlight=False,
        soft_wrap=True,
    )
    heads = ["epoch", *(["step"] if steps_per_epoch else []), "lost", "kept"]
    rows = []
    for place in range(0, 101, 10):
        step = [f"{passes[place] * steps_per_epoch:,.0f}"] if steps_per_epoch else []
        rows.append([f"{passes[place]:.3g}", *step, f"{lost[place]:.1%}", f"{1 - lost[place]:.1%}"])
    _print(heads, rows)
    if "base_rate" not in given:
        note = f"base rate {dynamics.BASE_RATE:g} is a guess: curves can be compared, their height needs a run of yours"
        out.print(note, style="dim", highlight=False)
    scale, across = (steps_per_epoch, "optimizer step") if steps_per_epoch else (1, "epoch")
    return picture([(x * scale, y) for x, y in zip(passes.tolist(), lost.tolist())], across=across)


def _run(run: Path, at: list[float], law: str | None, measure: str | None, confidence: float) -> Picture:
    """Print forecasts of a run; the picture of the law that fits best."""
    import numpy as np

    from retain.cli.common import console
    from retain.functional import dynamics
    from retain.report.dynamics import picture, read_looks

    looks = read_looks(run, measure)
    laws: Sequence[Any] = [law] if law else dynamics.LAWS
    fits = [dynamics.fit(looks.steps, looks.forgetting, law=one) for one in laws]
    last = fits[0].last
    steps = sorted(at) or [2 * last]
    rows, far = [], False
    for found in fits:
        constants = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in found.constants().items())
        for step in steps:
            said = dynamics.forecast(found, step, confidence)
            far = far or said.far
            forecast = [f"{said.value:.3g}", f"{said.low:.3g} to {said.high:.3g}"]
            rows.append([found.law, constants, f"{found.spread:.2g}", f"{step:,.0f}", *forecast])
    out = console()
    out.print(
        f"{looks.unit}: {len(fits[0].steps)} looks up to step {last:,.0f}, there {looks.forgetting[-1]:.3g}",
        highlight=False,
    )
    _print(["law", "constants", "scatter", "step", "forecast", f"{confidence:.0%} of looks"], rows)
    notes = ["a forecast holds if training goes on as it did: same data, same learning rate, no new task"]
    if far:
        notes.append(f"more than {dynamics.FAR} times as far as the looks reach: trust none of it")
    for note in notes:
        out.print(note, style="dim", highlight=False)
    best = min(fits, key=lambda found: found.spread)
    ahead = np.linspace(0, max(last, *steps), 61)[1:]
    band = [dynamics.forecast(best, step, confidence) for step in ahead]
    curve = [(0.0, 0.0), *((f.step, f.value) for f in band)]
    return picture(curve, list(zip(looks.steps, looks.forgetting)), band, up=looks.unit)


def _print(heads: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    from retain.cli.common import console

    table = Table(box=None, header_style="dim", pad_edge=False)
    for head in heads:
        words = head in ("law", "constants")
        table.add_column(head, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        table.add_row(*row)
    console().print(table)
