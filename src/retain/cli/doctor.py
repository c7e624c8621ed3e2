"""`retain doctor`: what is installed, what works here, and what to do where it does not."""

from __future__ import annotations

import typer

#: Bytes per parameter: weights, gradients, Adam's two moments and the start in float32; weights alone; four bits.
_FULL, _ADAPTER, _QUANTIZED = 20, 4, 0.6
_FOR_WEIGHTS = 0.6  # of free memory; the rest is for what a step computes


def command() -> None:
    """Check this machine: versions, device, arithmetic, starter model, disk."""
    import shutil
    from importlib.util import find_spec

    from rich.markup import escape
    from rich.table import Table

    from retain.cli.common import console, quiet_libraries
    from retain.rundir import environment

    quiet_libraries()
    import torch

    from retain.errors import RetainError
    from retain.models import machine
    from retain.models.params import computes_bf16
    from retain.models.starter import cache_directory, starter_directory

    table = Table("check", "found", "note")
    found = environment()
    for name, number in found["versions"].items():
        table.add_row(name, number, "")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {found['processors']} cores"
    table.add_row("device", device, "" if torch.cuda.is_available() else "small models only")
    free = machine.free_bytes("cuda" if torch.cuda.is_available() else "cpu")
    fits = [_million(free * _FOR_WEIGHTS / size) for size in (_FULL, _ADAPTER, _QUANTIZED)]
    note = f"models of about {fits[0]} parameters in full, {fits[1]} with LoRA, {fits[2]} with QLoRA; see retain plan"
    table.add_row("memory", f"{free / 2**30:.0f} GiB free", note)
    if find_spec("bitsandbytes") is None:
        table.add_row("bitsandbytes", "missing", escape("for 4-bit bases: pip install 'retain[qlora]'"))
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


def _million(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
