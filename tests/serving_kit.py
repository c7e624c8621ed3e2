"""A tiny base with three experts that answer differently, behind an engine and a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from retain.experts.choice import Choice
from retain.experts.engine import Engine
from retain.experts.library import ExpertLibrary
from retain.experts.pool import AdapterPool
from retain.experts.server.app import Service
from retain.experts.server.running import Server
from retain.models.load import load_model

EXPERTS = {"medicine": ("all-linear", 4), "poems": (["q_proj", "v_proj"], 8), "law": (["down_proj", "o_proj"], 3)}


def make_library(folder: Path) -> ExpertLibrary:
    """A library of experts with other ranks and layers, whose changes are large enough to be heard."""
    tokenizer = tiny_tokenizer()
    base = folder / "models" / "tiny"
    tiny_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    library = ExpertLibrary(folder / "experts")
    for seed, (name, (targets, rank)) in enumerate(EXPERTS.items(), start=1):
        model = get_peft_model(
            tiny_model(tokenizer), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        )
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / "adapters" / name)
        library.add(name, folder / "adapters" / name, base=str(base), examples=[f"{name} {i}?" for i in range(4)])
    return library


class ByWord:
    """Routes a question to the expert whose name is in it."""

    name = "by word"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def route(self, prompts: Sequence[str]) -> list[Choice]:
        found = [next((name for name in self.names if name in prompt), None) for prompt in prompts]
        return [Choice(name, 0.9, {name: 0.9} if name else {}, f"says {name}", 0.001) for name in found]


def open_engine(library: ExpertLibrary, **settings: Any) -> Engine:
    """An engine that is not started yet."""
    model, tokenizer = load_model(library.base or "")
    pool = AdapterPool(model.eval().requires_grad_(False), library, settings.pop("limit", None))
    return Engine(pool, tokenizer, settings.pop("router", ByWord(library.names())), **settings)


@contextmanager
def running(service: Service, grace: float = 5.0) -> Iterator[Server]:
    """The service behind a real socket, in a thread."""
    server = Server(service, "127.0.0.1", 0, grace)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield server
    finally:
        server.leave()
        thread.join(10)
        assert not thread.is_alive()


def until(true: Any, seconds: float = 10.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)
