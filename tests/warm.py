"""Processes of their own that need not import everything again: each is a fork of one that did it once.

Importing torch, transformers, TRL and PEFT takes a process of a tiny training longer than the training. A fork server
(of `multiprocessing`) imports them when the first process is asked for; every other begins where it stands, with an
environment, arguments and files of its own, can be killed, and ends with an exit code, as a script does.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from run_kit import environment

# what the imports find out about a GPU does not survive a fork
_CONTEXT = multiprocessing.get_context("spawn" if os.environ.get("RETAIN_TESTS_ON") == "gpu" else "forkserver")
_CONTEXT.set_forkserver_preload(["peft", "retain.pipeline", "training_kit"])
_NUMBER = itertools.count()


class Script:
    """A script in a process of its own, with its output in files; used like a `subprocess.Popen`.

    Args:
        script: a Python file, run as `__main__`.
        arguments: its words.
        folder: where its output is kept.
        more: variables besides those of `run_kit.environment`.
        at: the folder that it works in; default: that of the server.
    """

    def __init__(
        self,
        script: Path,
        arguments: list[str],
        folder: Path,
        more: Mapping[str, str] | None = None,
        at: Path | None = None,
    ) -> None:
        name = f"process-{next(_NUMBER)}"
        self._files = folder / f"{name}.out", folder / f"{name}.err"
        given = environment() | dict(more or {})
        self._process = _CONTEXT.Process(target=_run, args=(str(script), arguments, given, at, *map(str, self._files)))
        with _importable(given["PYTHONPATH"]):
            self._process.start()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def said(self) -> str:
        """What it wrote until now, on both."""
        return "".join(path.read_text() for path in self._files if path.exists())

    def send_signal(self, number: int) -> None:
        """A signal, to a process that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._process.pid), number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; (standard output, standard error).

        Raises:
            subprocess.TimeoutExpired: it was killed after so many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            self._process.join()
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        return out, err

    @property
    def returncode(self) -> int | None:
        """As `poll`."""
        return self.poll()


def command(words: list[str], folder: Path, more: Mapping[str, str] | None = None, at: Path | None = None) -> Script:
    """`retain WORDS` in a process of its own, as `Script`."""
    return Script(Path(__file__).parent / "command.py", words, folder, more, at)


@contextlib.contextmanager
def _importable(paths: str):
    """The server finds our packages by the variable alone: it is not told of `sys.path`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = paths
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(script: str, arguments: list[str], given: dict[str, str], at: Path | None, out: str, err: str) -> None:
    gc.freeze()  # as in conftest.py
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(given)
    if at is not None:
        os.chdir(at)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
