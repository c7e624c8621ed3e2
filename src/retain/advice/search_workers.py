"""Several processes that carry out the trials of one search, and the bar that shows how far they are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from retain.advice.search import Search, Units, work
from retain.errors import RetainError, RunError

#: New interpreters: a fork of a process that has used a GPU cannot use it.
CONTEXT: Any = multiprocessing.get_context("spawn")
#: Seconds between two looks at the storage.
PAUSE = 0.5


def in_parallel(
    search: Search,
    units: Units,
    workers: int,
    progress: Callable[[int, int], None],
    begin: Callable[[], None],
) -> None:
    """Carry out all trials in so many processes. Their output goes to `workers/NUMBER.log` in the folder.

    Args:
        progress: receives how many trials have ended, and how many there are as far as is known.
        begin: a function of a module, called first in every process.

    Raises:
        RunError: a process ended before there was nothing left to do.
    """
    logs = [search.folder / "workers" / f"{i}.log" for i in range(1, workers + 1)]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    processes: list[Any] = []
    study = search.study()
    try:
        for i, log in enumerate(logs):
            with _machine_share(i, workers):
                processes.append(CONTEXT.Process(target=_work, args=(search, units, str(log), begin)))
                processes[-1].start()
        while any(process.exitcode is None for process in processes):
            for process in processes:
                process.join(PAUSE / workers)
            ended = sum(trial.state != "running" for trial in study.tried())
            progress(ended, max(search.most or 0, ended + study.open))
    except BaseException:  # Ctrl-C above all: they stop where they are, and go on from there another time
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGINT)
        for process in processes:
            if process.pid is not None:
                process.join()
        raise
    bad = [(log, process.exitcode) for log, process in zip(logs, processes) if process.exitcode]
    if bad and (study.open or len(bad) == workers):
        log, code = bad[0]
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        raise RunError(
            f"{log}: this process of the search ended with {code} ({last[:200]}). Run the same command again."
        )


def _work(search: Search, units: Units, log: str, begin: Callable[[], None]) -> None:
    with open(log, "a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    begin()
    try:
        work(search, units, lambda line: print(line, flush=True))
    except RetainError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _machine_share(place: int, workers: int) -> Iterator[None]:
    """What a process that starts here sees of the machine: its share of the cores, one GPU of several."""
    import torch

    own = (
        {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        if "OMP_NUM_THREADS" not in os.environ
        else {}
    )
    gpus = torch.cuda.device_count()
    if gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        own["CUDA_VISIBLE_DEVICES"] = str(place % gpus)
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
