"""Measuring two things in turn, in one process: functions, and whole trainers step by step."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from retain.models.params import computes_bf16

WARM_UP = 3  # steps of a training that are not counted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where `retain run` trains


@dataclass(frozen=True)
class Settings:
    """What is measured on."""

    model: str = "starter"
    repeats: int = 5
    batch: int = 8
    data: str | None = None
    items: str | None = None
    count: int = 200

    @property
    def half(self) -> bool:
        """Whether training computes in bfloat16, as `retain run` decides it."""
        return computes_bf16(DEVICE)


@dataclass(frozen=True)
class Line:
    """One line of the table; `low` and `high` are those of the pairs, None where there is one number."""

    work: str
    against: str
    value: float
    bound: float
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    detail: str = ""
    seconds: list[list[float]] = field(default_factory=list)  # of both, pair by pair

    @property
    def met(self) -> bool:
        return self.value <= self.bound

    def show(self, number: float | None) -> str:
        if number is None:
            return ""
        return f"{number:.0f} {self.unit}" if self.unit == "items" else f"{number:.2f}{_gap(self.unit)}"


def _gap(unit: str) -> str:
    return unit if unit == "x" else f" {unit}"


def ratio(work: str, against: str, times: list[list[float]], bound: float, detail: str) -> Line:
    """The line of two series of paired times: median, smallest and largest ratio."""
    pairs = [a / b for a, b in zip(*times, strict=True)]
    a, b = (statistics.median(one) for one in times)
    shown = f"{detail}; medians {_seconds(a)} against {_seconds(b)}."
    return Line(work, against, statistics.median(pairs), bound, min(pairs), max(pairs), detail=shown, seconds=times)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def in_turn(one: Callable[[int], Any], other: Callable[[int], Any], repeats: int) -> list[list[float]]:
    """Seconds of `one(i)` and `other(i)` for i = 0, 1, …, called in turn."""
    times: list[list[float]] = [[], []]
    for i in range(repeats):
        for call, seen in zip((one, other), times):
            gc.collect()
            start = now()
            call(i)
            seen.append(now() - start)
    return times


def now() -> float:
    """Seconds on a clock, when everything that was asked of a GPU is done."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Company:
    """How much of the machine other programs used during a block: with much of it, seconds mean little."""

    def __enter__(self) -> Company:
        self.start, self.mine, self.all = time.monotonic(), self._mine(), self._all()
        return self

    def __exit__(self, *error: object) -> None:
        room = (time.monotonic() - self.start) * (psutil.cpu_count() or 1)
        self.share = min(1.0, max(0.0, (self._all() - self.all) - (self._mine() - self.mine)) / room)

    @staticmethod
    def _mine() -> float:
        return sum(os.times()[:4])

    @staticmethod
    def _all() -> float:
        times = psutil.cpu_times()
        return times.user + times.system + times.nice


class Baton(TrainerCallback):
    """One runner of a relay: a trainer that takes an optimizer step and then waits for the others to take one.

    Exactly one trainer runs at any time. The rest of its work (loading, importances, logs) happens outside the
    timed part, which is from the first forward pass to the end of the step.
    """

    def __init__(self, relay: list[Baton]) -> None:
        self.relay, self.go, self.running = relay, threading.Semaphore(0), True
        self.seconds: list[float] = []
        self.error: BaseException | None = None
        relay.append(self)

    def pass_on(self) -> None:
        place = self.relay.index(self)
        for other in self.relay[place + 1 :] + self.relay[: place + 1]:
            if other.running:
                other.go.release()
                return

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.pass_on()
        self.go.acquire()
        self.start = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.start)

    def run(self, train: Callable[[], Any]) -> None:
        self.go.acquire()
        try:
            train()
        except BaseException as error:
            self.error = error
        self.running = False
        self.pass_on()


def steps_in_turn(trainers: Sequence[Any]) -> list[list[float]]:
    """Seconds of every optimizer step of trainers that take steps in turn: A1 B1 A2 B2 …

    The first steps are left out: in them the optimizer makes its state, and memory is used for the first time.
    """
    relay: list[Baton] = []
    threads = []
    for trainer in trainers:
        baton = Baton(relay)
        trainer.add_callback(baton)
        threads.append(threading.Thread(target=baton.run, args=(trainer.train,)))
    for thread in threads:
        thread.start()
    relay[0].go.release()
    for thread in threads:
        thread.join()
    for baton in relay:
        if baton.error is not None:
            raise baton.error
    return [baton.seconds[WARM_UP:] for baton in relay]


class Memory(TrainerCallback):
    """Peak bytes of tensors while a trainer takes its steps.

    The resident size of the process also holds libraries, buffers of the maths library and what malloc keeps, so
    it is neither exact nor repeatable. Here every allocation and release is counted that PyTorch's own allocator
    makes during the steps, on top of the storages that are alive when they begin (weights, anchor, importance).
    On a GPU the allocator counts by itself.
    """

    def __init__(self) -> None:
        self.before = _alive()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if DEVICE != "cpu":
            torch.cuda.reset_peak_memory_stats()
            return
        self.base = _alive() - self.before
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if DEVICE != "cpu":
            self.peak = torch.cuda.max_memory_allocated() - self.before
            return
        self.profile.stop()
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        self.peak = self.base + highest
        del self.profile


def give_back() -> None:
    """Frees what is not used any more. Each thread that trains has a heap of its own in glibc, which keeps what was
    freed until it is asked: a table of all methods would fill the memory with it."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _alive() -> int:
    """Bytes of all storages that a tensor holds now, on the device where training is."""
    gc.collect()
    if DEVICE != "cpu":
        return torch.cuda.memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes(make: Callable[[], Any]) -> int:
    """Peak bytes of the training of a trainer, with everything that it and its model hold."""
    memory = Memory()
    trainer = make()
    trainer.add_callback(memory)
    trainer.train()
    return memory.peak
