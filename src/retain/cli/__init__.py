"""The command line. One file per command; the directory is the list of commands.

Exit codes: 0 done, 1 the run failed, 2 bad input.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

from retain.errors import RetainError, disk_full

app = typer.Typer(
    name="retain",
    help="Fine-tune a language model without forgetting: measure it, prevent it, show it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

#: Exit code after Ctrl-C.
STOPPED = 130

#: In the order in which a newcomer needs them; files that are not named here follow.
_ORDER = [
    *("demo", "run", "plan", "advise", "probe", "retention", "compare", "search", "report", "simulate"),
    *("experts", "chat", "serve", "merge", "repair"),
    *("methods", "synth", "export", "doctor"),
]


@app.callback()
def _about() -> None:
    """Fine-tune a language model without forgetting: measure it, prevent it, show it."""


def _commands() -> None:
    if app.registered_commands:
        return
    names = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - {"common"}
    for name in sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n)):
        module = importlib.import_module(f"retain.cli.{name}")
        if hasattr(module, "app"):  # a command with commands of its own
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(module.command)


def main() -> None:
    """Entry point: mistakes of the user become one line on standard error."""
    _commands()
    try:
        app()
    except RetainError as error:
        print(f"retain: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == STOPPED:  # Typer's answer to Ctrl-C
            print("retain: stopped. Run the same command again to go on.", file=sys.stderr)
        raise
    except Exception as error:
        if reason := disk_full(error):
            print(f"retain: the disk is full ({reason}). Free some and run the same command again.", file=sys.stderr)
            sys.exit(2)
        raise
