"""Speed and free memory of a machine."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch

from retain.models import machine
from retain.models.machine import Speed
from retain.models.weightless import Cost


def test_an_operation_takes_its_arithmetic_or_its_traffic():
    speed = Speed({"float32": 100.0, "bfloat16": 400.0}, bytes=10.0, mapped=5.0, start=0.5, waits=True)
    cost = Cost(Counter({("float32", 1000, 10): 2, ("float32", 0, 30): 1, ("bfloat16", 400, 10): 3}), {}, 20)
    assert speed.seconds(cost) == pytest.approx(2 * 10 + 3 + 3 * 1 + 6 * 0.5 + 20 / 5)
    ahead = Speed(speed.flops, speed.bytes, speed.mapped, start=10.0, waits=False)
    assert ahead.seconds(cost) == pytest.approx(60), "starting is slower than working"


def test_an_unknown_kind_runs_at_the_slowest_speed():
    speed = Speed({"float32": 100.0, "attention": 50.0}, bytes=1e9, mapped=1e9, start=0.0, waits=True)
    assert speed.seconds(Cost(Counter({("float64", 100, 0): 1}))) == pytest.approx(2)


def test_costs_add_up():
    one = Cost(Counter({("float32", 1, 2): 1}), {"activations": 3}, 4)
    both = one + Cost(Counter({("float32", 1, 2): 2}), {"head": 5}, 6)
    assert both == Cost(Counter({("float32", 1, 2): 3}), {"activations": 3, "head": 5}, 10)


def test_this_machine_has_a_speed():
    found = machine.measure("cpu", torch.bfloat16)
    assert found.flops.keys() == {"float32", "bfloat16", "attention"}
    assert all(1e8 < speed < 1e16 for speed in found.flops.values())
    assert 1e7 < found.mapped <= 2 * found.bytes < 1e14
    assert 1e-7 < found.start < 1e-2


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    mine = 5 * 2**20
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 2**20))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=mine))
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(machine, "_LIMIT", limit)
    monkeypatch.setattr(machine, "_USED", used)
    assert machine.free_bytes("cpu") == 105 * 2**20
    limit.write_text("max\n")
    assert machine.free_bytes("cpu") == 105 * 2**20
    limit.write_text(f"{50 * 2**20}\n")
    used.write_text(f"{20 * 2**20}\n")
    assert machine.free_bytes("cpu") == 35 * 2**20
    assert machine.spare_bytes("cpu") == 30 * 2**20
