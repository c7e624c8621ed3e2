"""Commands as they are typed, in the process of the tests."""

from __future__ import annotations

import sys

import pytest

from retain.cli import main


def typed(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `retain WORDS`; its exit code."""
    monkeypatch.setattr(sys, "argv", ["retain", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def retain(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run a command that ends well."""
    assert typed(monkeypatch, *words) == 0


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command with bad input says."""
    assert typed(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("retain: ")
    return line


def speaking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str):
    """`command(*words)` runs `retain FIRST WORDS`: what it printed, or with `refused` the one line of the error."""

    def command(*words: str, refused: bool = False) -> str:
        code = typed(monkeypatch, *first, *words)
        said = capsys.readouterr()
        assert code == (2 if refused else 0), said.err
        if refused:  # progress bars may stand before it
            (line,) = (line for line in said.err.splitlines() if line.startswith("retain: "))
            return line
        return said.out

    return command
