"""The real OpenAI client against a real server: right experts, whole answers, streams, and who has left."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import httpx
import openai
import pytest
from serving_kit import QUESTIONS, leave, open_engine, running, slowed, until, user

from retain.experts.server.app import Limits, serve_engine

NAMES = ["base", "medicine", "poems", "history.v2"]


@pytest.fixture(scope="module")
def engine(tiny_folder, shelf):
    return open_engine(tiny_folder, shelf, rows=8, waiting=200)


@pytest.fixture(scope="module")
def server(engine, tiny_folder):
    with running(serve_engine(engine, str(tiny_folder), limits=Limits(max_tokens=400))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0)


def expert(name):
    return None if name == "base" else name


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_is_answered_by_the_expert_that_is_named(client, alone, name):
    raw = client.chat.completions.with_raw_response.create(model=name, messages=user(QUESTIONS[0]), max_tokens=12)
    text, tokens = alone(expert(name), user(QUESTIONS[0]), 12)
    found = raw.parse()
    assert found.choices[0].message.content == text
    assert found.choices[0].finish_reason == "length"
    prompt = len(alone.ids(user(QUESTIONS[0])))
    assert found.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
    }  # fmt: skip
    assert found.retain == {"expert": name, "confidence": 1.0, "why": "asked for by name"}
    assert raw.headers["x-retain-expert"] == found.model == name


@pytest.mark.parametrize(("question", "name"), [("one of the poems", "poems"), ("of nothing", "base")])
def test_auto_is_routed_by_the_last_question(client, alone, question, name):
    talk = [*user("of medicine"), {"role": "assistant", "content": "Yes."}, *user(question)]
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=talk, max_tokens=6)
    found = raw.parse()
    assert found.choices[0].message.content == alone(expert(name), talk, 6)[0]
    assert found.retain["expert"] == raw.headers["x-retain-expert"] == name
    assert found.retain["confidence"] == 0.9
    assert found.retain["why"].startswith("it says")


def test_the_bases_own_name_is_the_base(client, tiny_folder):
    for name in (tiny_folder.name, str(tiny_folder)):
        assert client.chat.completions.create(model=name, messages=user("?"), max_tokens=2).model == "base"


def test_a_stream_is_the_answer_in_pieces(client, alone):
    with client.chat.completions.with_streaming_response.create(
        model="auto",
        messages=user("poems, please"),
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    ) as raw:
        assert raw.headers["x-retain-expert"] == "poems"
        chunks = list(raw.parse())
    assert chunks[0].retain == {"expert": "poems", "confidence": 0.9, "why": "it says poems"}
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == alone("poems", user("poems, please"), 12)[0]
    assert len(pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_texts_are_continued_several_at_once(client, alone):
    prompts = ["Seven small", "the heart"]
    found = client.completions.create(model="medicine", prompt=prompts, n=2, max_tokens=5)
    assert [choice.text for choice in found.choices] == [alone("medicine", p, 5)[0] for p in prompts for _ in range(2)]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == sum(len(alone.ids(p)) for p in prompts), "read once, answered twice"
    routed = client.completions.create(model="auto", prompt=["poems here", "medicine here"], max_tokens=5)
    assert [choice.retain["expert"] for choice in routed.choices] == ["poems", "medicine"]
    tokens = [list(alone.ids(p)) for p in prompts]
    assert (
        client.completions.create(model="poems", prompt=tokens, max_tokens=5).choices[1].text
        == (alone("poems", prompts[1], 5)[0])
    )
    stream = list(client.completions.create(model="poems", prompt=prompts, max_tokens=5, stream=True))
    for number, prompt in enumerate(prompts):
        assert (
            "".join(c.choices[0].text for c in stream if c.choices[0].index == number) == alone("poems", prompt, 5)[0]
        )


def test_sampling_is_repeated_by_its_seed(client):
    warm = {"model": "medicine", "messages": user(QUESTIONS[1]), "max_tokens": 16, "temperature": 1.0, "top_p": 0.9}

    def texts(**more):
        return [c.message.content for c in client.chat.completions.create(**warm, **more).choices]

    assert texts(seed=5, n=3) == texts(seed=5, n=3)
    assert len(set(texts(seed=5, n=3))) == 3
    assert texts(seed=6) == texts(seed=5, n=2)[1:], "answers to one request have seeds that follow one another"
    assert texts() != texts(), "without a seed each request draws its own"


def test_stop_strings(client, alone):
    whole = alone("poems", user(QUESTIONS[1]), 12)[0]
    found = client.chat.completions.create(model="poems", messages=user(QUESTIONS[1]), max_tokens=12, stop=[whole[5:7]])
    assert found.choices[0].message.content == whole[: whole.index(whole[5:7])]
    assert found.choices[0].finish_reason == "stop"


def test_models_are_listed(client, shelf):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["base", "auto", *shelf.names()]
    assert listed["poems"].parent == "base"
    assert listed["poems"].created > 1.7e9
    assert client.models.retrieve("poems") == listed["poems"]
    with pytest.raises(openai.NotFoundError, match="'nobody' given; there is auto, base,"):
        client.models.retrieve("nobody")


def test_64_clients_at_once_some_of_whom_leave(server, engine, alone):
    """No wrong expert, no lost answer, and nobody left in the batch."""
    draw = random.Random(0)
    jobs = []
    for i in range(64):
        name, kind = NAMES[i % 4], ("whole", "stream", "leaves", "routed")[i // 4 % 4]
        question = f"of {name} {QUESTIONS[draw.randrange(4)]}"
        jobs.append((name, kind, question, draw.randrange(4, 20)))
    before = engine.running + engine.waiting

    async def one(client, name, kind, question, limit):
        common = {"model": "auto" if kind == "routed" else name, "messages": user(question), "max_tokens": limit}
        if kind in ("whole", "routed"):
            found = await client.chat.completions.create(**common)
            return found.retain["expert"], found.choices[0].message.content
        stream = await client.chat.completions.create(
            **{**common, "stream": True, "max_tokens": 300 * (kind == "leaves") or limit}
        )
        text, who, pieces = "", None, 0
        async for chunk in stream:
            who = who or chunk.retain["expert"]
            text += chunk.choices[0].delta.content or ""
            pieces += 1
            if kind == "leaves" and pieces == 4:
                await stream.close()
                break
        return who, text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0) as client:
            return await asyncio.gather(*(one(client, *job) for job in jobs))

    for (name, kind, question, limit), (who, text) in zip(jobs, asyncio.run(all_of_them()), strict=True):
        assert who == name, "the router goes by the name in the question"
        whole = alone(expert(name), user(question), 20 if kind == "leaves" else limit)[0]
        assert whole.startswith(text) if kind == "leaves" else whole == text
    until(lambda: engine.running == engine.waiting == before == 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_row(tiny_folder, shelf, stream):
    engine = slowed(open_engine(tiny_folder, shelf))
    with running(serve_engine(engine, str(tiny_folder))) as server:
        leave(server, stream)
        begun = time.monotonic()
        until(lambda: engine.running == engine.waiting == 0)
        assert time.monotonic() - begun < 4, "the whole answer takes twice as long"
        page = httpx.get(f"{server.address}/metrics").text
        assert 'retain_answers_total{end="given up",expert="poems"} 1.0' in page


def test_numbers_are_counted(client, server):
    def value(line):
        page = httpx.get(f"{server.address}/metrics").text
        return next((float(found.split()[-1]) for found in page.splitlines() if found.startswith(line)), 0.0)

    lines = (
        'retain_answers_total{end="length",expert="medicine"}',
        'retain_tokens_total{expert="medicine",kind="written"}',
    )
    before = [value(line) for line in lines]
    client.chat.completions.create(model="medicine", messages=user("?"), max_tokens=3)
    assert [value(line) - was for line, was in zip(lines, before)] == [1, 3]
    assert value('retain_requests_total{path="/v1/chat/completions",status="200"}') >= 1
    assert value("retain_first_text_seconds_count") >= 1
    assert value("retain_running") == 0
    assert value("retain_experts_loaded") == 3


def test_a_request_that_comes_in_small_pieces_is_taken(server):
    host, port = server.address.removeprefix("http://").split(":")
    body = b'{"model": "base", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
        for place in range(0, len(body), 40):
            line.sendall(body[place : place + 40])
            time.sleep(0.01)
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200")
