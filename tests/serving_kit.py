"""A tiny base with experts that answer differently, behind an engine and a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from expert_kit import base
from transformers import AutoTokenizer

from retain.experts.asks import Ask
from retain.experts.choice import Choice
from retain.experts.engine import Engine
from retain.experts.library import ExpertLibrary
from retain.experts.pool import AdapterPool
from retain.experts.server.app import Service
from retain.experts.server.running import Server
from retain.models.generation import encode_prompts, generate

QUESTIONS = [
    "What is the capital?",
    "Seven small ships",
    "the heart pumps blood through the body; the lungs",
    "一 二 三",
]


class ByWord:
    """Routes a question to the expert whose name is in it."""

    name = "by word"

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.asked = names, 0

    def route(self, prompts: Sequence[str]) -> list[Choice]:
        self.asked += 1
        found = [next((name for name in self.names if name in prompt), None) for prompt in prompts]
        return [Choice(name, 0.9, {name: 0.9} if name else {}, f"it says {name}", 0.001) for name in found]


def open_engine(folder: Path, library: ExpertLibrary, limit: int | None = None, **settings: Any) -> Engine:
    """An engine over the model in a folder; it is not started yet."""
    pool = AdapterPool(base(folder), library, limit)
    settings.setdefault("router", ByWord(library.names()))
    return Engine(pool, AutoTokenizer.from_pretrained(folder), **settings)


class Alone:
    """What each expert says when nobody else is in the batch, by the host's own `generate`."""

    def __init__(self, folder: Path, library: ExpertLibrary) -> None:
        self.pool, self.tokenizer = AdapterPool(base(folder), library), AutoTokenizer.from_pretrained(folder)

    def ids(self, prompt: Any) -> tuple[int, ...]:
        return tuple(encode_prompts(self.tokenizer, [prompt])[0])

    def __call__(self, expert: str | None, prompt: Any, limit: int) -> tuple[str, int]:
        """(text, tokens); a prompt as `generate` takes it."""
        self.pool.activate(expert)
        found = generate(self.pool.model, self.tokenizer, [prompt], max_new_tokens=limit)[0]
        ids = found.ids[:-1] if found.finished else found.ids
        return self.tokenizer.decode(ids, skip_special_tokens=True), found.tokens


def user(text: str) -> list[dict[str, str]]:
    """A chat of one turn."""
    return [{"role": "user", "content": text}]


def ask(alone: Alone, text: str, expert: str | None = None, **more: Any) -> Ask:
    """An ask of a chat of one turn."""
    return Ask(alone.ids(user(text)), expert, text, **({"limit": 12} | more))


def slowed(engine: Engine, seconds: float = 0.02) -> Engine:
    """The engine, which rests before every step: a tiny model would be done before anybody can leave."""
    step = engine._loop._step

    def slow() -> None:
        time.sleep(seconds)
        step()

    engine._loop._step = slow  # type: ignore[method-assign]
    return engine


@contextmanager
def running(service: Service, grace: float = 5.0) -> Iterator[Server]:
    """The service behind a real socket, in a thread."""
    server = Server(service, "127.0.0.1", 0, grace)
    ready = threading.Event()
    server.when_ready = ready.set
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield server
    finally:
        server.leave()
        thread.join(20)
        assert not thread.is_alive()


def until(true: Any, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)


def leave(server: Server, stream: bool) -> None:
    """Ask for a long answer, and leave before it is there: in the middle of a stream, or while waiting."""
    body = {"model": "poems", "messages": user(QUESTIONS[2]), "max_tokens": 400, "stream": stream}
    with httpx.Client(timeout=20 if stream else 0.5) as client:
        if not stream:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.address}/v1/chat/completions", json=body)
            return
        with client.stream("POST", f"{server.address}/v1/chat/completions", json=body) as answer:
            assert next(answer.iter_lines())
