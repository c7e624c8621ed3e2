"""The router in front of a second `retain serve`: it chooses, the other answers, and everything is handed through."""

from __future__ import annotations

import json
import socket
import time

import httpx
import openai
import pytest
from serving_kit import QUESTIONS, ByWord, leave, open_engine, running, slowed, until, user

from retain.experts.server.app import Limits, serve_engine, serve_upstream
from retain.experts.server.upstream import Upstream


@pytest.fixture(scope="module")
def engine(tiny_folder, shelf):
    return open_engine(tiny_folder, shelf)


@pytest.fixture(scope="module")
def behind(engine, tiny_folder):
    with running(serve_engine(engine, str(tiny_folder), ["secret"], Limits(max_tokens=400))) as server:
        yield server


def front(behind, shelf, key="secret", base=None, seconds=60.0, url=None):
    router = ByWord(shelf.names())
    other = Upstream(url or f"{behind.address}/v1", key, base, seconds)
    return serve_upstream(other, shelf, "starter", lambda question: router.route([question])[0])


@pytest.fixture(scope="module")
def server(behind, shelf):
    with running(front(behind, shelf)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0)


@pytest.mark.parametrize(("question", "name"), [("the poems", "poems"), ("nothing", None)])
def test_auto_becomes_the_name_that_the_router_chooses(client, alone, question, name):
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=user(question), max_tokens=8)
    found = raw.parse()
    assert found.choices[0].message.content == alone(name, user(question), 8)[0]
    assert found.retain == {"expert": name or "base", "confidence": 0.9, "why": f"it says {name}"}
    assert raw.headers["x-retain-expert"] == (name or "base")


def test_a_stream_is_handed_through(client, alone):
    chunks = list(client.chat.completions.create(model="auto", messages=user("medicine"), max_tokens=12, stream=True))
    assert chunks[0].retain == {"expert": "medicine", "confidence": 0.9, "why": "it says medicine"}
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert "".join(pieces) == alone("medicine", user("medicine"), 12)[0]
    assert len(pieces) > 3


def test_a_text_and_a_name(client, alone):
    found = client.completions.create(model="auto", prompt="of poems", max_tokens=6)
    assert found.choices[0].text == alone("poems", "of poems", 6)[0]
    found = client.completions.create(model="medicine", prompt="of poems", max_tokens=6)
    assert found.choices[0].text == alone("medicine", "of poems", 6)[0]
    assert found.retain["why"] == "asked for by name"


def test_errors_are_handed_through(server, client):
    def post(body):
        answer = httpx.post(f"{server.address}/v1/chat/completions", json=body)
        return answer.status_code, answer.json()["error"]

    status, error = post({"model": "poems", "messages": user("?"), "tools": []})
    assert (status, error["param"], error["code"]) == (400, "tools", "unsupported_parameter")
    status, error = post({"model": "only there", "messages": user("?")})
    assert (status, error["code"]) == (404, "model_not_found"), "a name that is not known here is the other's matter"
    status, error = post({"model": "poems", "messages": user("?"), "stream": True, "max_tokens": 0})
    assert (status, error["param"]) == (400, "max_tokens")
    for bad in (b"{", b"[]", b'{"model": 3}', b'{"model": "auto", "messages": 7}', b"[" * 5000):
        answer = httpx.post(f"{server.address}/v1/chat/completions", content=bad)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_the_row_behind(tiny_folder, shelf, stream):
    engine = slowed(open_engine(tiny_folder, shelf))
    with running(serve_engine(engine, str(tiny_folder))) as behind, running(front(behind, shelf)) as server:
        leave(server, stream)
        begun = time.monotonic()
        until(lambda: engine.running == engine.waiting == 0)
        assert time.monotonic() - begun < 4, "the whole answer takes twice as long"


def test_the_one_behind_is_not_there(behind, shelf):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with running(front(behind, shelf, url=url)) as server:
        for model in ("poems", "base"):
            body = {"model": model, "messages": user("?")}
            answer = httpx.post(f"{server.address}/v1/chat/completions", json=body)
            assert answer.status_code == 502
            assert "cannot be reached" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.address}/ready").status_code == 503
        assert httpx.get(f"{server.address}/health").status_code == 200


def test_its_key_and_its_time(behind, shelf, server):
    assert httpx.get(f"{server.address}/ready").status_code == 200
    with running(front(behind, shelf, key="wrong", base="base")) as other:
        answer = httpx.post(f"{other.address}/v1/chat/completions", json={"model": "base", "messages": user("?")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_one_behind_that_is_slow(tiny_folder, shelf):
    engine = slowed(open_engine(tiny_folder, shelf))
    with running(serve_engine(engine, str(tiny_folder))) as behind, running(front(behind, shelf, seconds=0.3)) as other:
        body = {"model": "poems", "messages": user(QUESTIONS[2]), "max_tokens": 400}
        answer = httpx.post(f"{other.address}/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_what_is_sent_on_is_what_came(shelf):
    """Fields that are not known here go on as they are; only the model's name is another."""
    seen = []

    async def other(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        seen.append((scope["path"], json.loads(body or b"null")))
        models = {"data": [{"id": "vendor/base"}, {"id": "poems", "parent": "vendor/base"}]}
        said = json.dumps(models if scope["path"] == "/v1/models" else {"choices": [], "own": 1}).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})

    class Plain:
        app = other
        gate = type("Gate", (), {"stopping": False, "inside": 0})()

    Plain.app = staticmethod(other)
    with running(Plain()) as behind, running(front(behind, shelf)) as server:
        body = {"model": "auto", "messages": user("?"), "top_k": 7, "tools": [{"a": 1}], "temperature": None}
        answer = httpx.post(f"{server.address}/v1/chat/completions", json=body).json()
    assert answer == {"choices": [], "own": 1, "retain": {"expert": "base", "confidence": 0.9, "why": "it says None"}}
    assert seen == [("/v1/models", None), ("/v1/chat/completions", body | {"model": "vendor/base"})]
