"""`retain doctor`: what is installed, what works here, and what to do where it does not."""

from __future__ import annotations

import typer


def command() -> None:
    """Check this machine: versions, device, arithmetic, starter model, disk."""
    import shutil

    from rich.table import Table

    from retain.cli.common import console, quiet_libraries
    from retain.rundir import environment

    quiet_libraries()
    import torch

    from retain.errors import RetainError
    from retain.models.params import computes_bf16
    from retain.models.starter import cache_directory, starter_directory

    table = Table("check", "found", "note")
    found = environment()
    for name, number in found["versions"].items():
        table.add_row(name, number, "")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {found['processors']} cores"
    table.add_row("device", device, "" if torch.cuda.is_available() else "small models only")
    half = computes_bf16("cuda" if torch.cuda.is_available() else "cpu")
    table.add_row("bfloat16", "fast" if half else "slow here", "used by default" if half else "float32 is used")
    ok = True
    try:
        table.add_row("starter model", str(starter_directory()), "")
    except RetainError as error:
        ok = False
        table.add_row("starter model", "[red]missing[/red]", str(error))
    free = shutil.disk_usage(cache_directory().parent if cache_directory().parent.exists() else ".").free
    table.add_row("disk", f"{free / 2**30:.0f} GiB free", "")
    console().print(table)
    raise typer.Exit(0 if ok else 1)
