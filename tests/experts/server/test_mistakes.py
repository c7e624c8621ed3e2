"""Whatever is asked wrongly has the shape of OpenAI's errors, and its own status; keys, limits, and the end."""

from __future__ import annotations

import asyncio
import json
import signal
import threading

import httpx
import openai
import pytest
from serving_kit import QUESTIONS, open_engine, running, slowed, until, user

from retain.experts.server import gate
from retain.experts.server.app import Limits, serve_engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD = {"model": "base", "messages": user("?"), "max_tokens": 1}


@pytest.fixture(scope="module")
def service(tiny_folder, shelf):
    engine = open_engine(tiny_folder, shelf, rows=2, waiting=3)
    limits = Limits(max_tokens=300, seconds=30, max_bytes=20_000)
    return serve_engine(engine, str(tiny_folder), ["right key", "another"], limits)


@pytest.fixture(scope="module")
def server(service):
    with running(service) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.address, headers={"Authorization": "Bearer right key"}, timeout=20) as http:
        yield http


def problem(response, status):
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    assert "\n" not in found["message"]
    return found


MALFORMED = [
    (CHAT, b"{", "body", "invalid_json"),
    (CHAT, b"", None, "invalid_value"),
    (CHAT, b"null", None, "invalid_value"),
    (CHAT, b"[]", None, "invalid_value"),
    (CHAT, b"\xff\xfe", None, None),
    (CHAT, {}, "model", "invalid_value"),
    (CHAT, {"model": "base"}, "messages", "invalid_value"),
    (CHAT, GOOD | {"model": 3}, "model", "invalid_value"),
    (CHAT, GOOD | {"messages": []}, "messages", "invalid_value"),
    (CHAT, GOOD | {"messages": "?"}, "messages", "invalid_value"),
    (CHAT, GOOD | {"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
    (CHAT, GOOD | {"messages": [{"role": "robot", "content": "?"}]}, "messages.0.role", "invalid_value"),
    (CHAT, GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "invalid_value"),
    (CHAT, GOOD | {"temperature": -1}, "temperature", "invalid_value"),
    (CHAT, GOOD | {"temperature": "warm"}, "temperature", "invalid_value"),
    (
        CHAT,
        b'{"model": "base", "messages": [{"role": "user", "content": "?"}], "temperature": NaN}',
        "temperature",
        None,
    ),
    (CHAT, b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', None, "invalid_value"),
    (CHAT, GOOD | {"top_p": 0}, "top_p", "invalid_value"),
    (CHAT, GOOD | {"max_tokens": 0}, "max_tokens", "invalid_value"),
    (CHAT, GOOD | {"max_tokens": 301}, "max_tokens", None),
    (CHAT, GOOD | {"n": 17}, "n", "invalid_value"),
    (CHAT, GOOD | {"stop": ""}, None, "invalid_value"),
    (CHAT, GOOD | {"seed": 2**64}, "seed", "invalid_value"),
    (CHAT, GOOD | {"stream_options": {"include": True}}, "stream_options.include", "unsupported_parameter"),
    (CHAT, GOOD | {"tools": []}, "tools", "unsupported_parameter"),
    (CHAT, GOOD | {"frequency_penalty": 0.5}, "frequency_penalty", "invalid_value"),
    (CHAT, GOOD | {"messages": user("a " * 600)}, "messages", "context_length_exceeded"),
    (TEXT, {"model": "base", "prompt": "a " * 600}, "prompt", "context_length_exceeded"),
    (TEXT, {"model": "base"}, "prompt", "invalid_value"),
    (TEXT, {"model": "base", "prompt": ""}, None, "invalid_value"),
    (TEXT, {"model": "base", "prompt": []}, None, "invalid_value"),
    (TEXT, {"model": "base", "prompt": [100000]}, "prompt", None),
    (TEXT, {"model": "base", "prompt": [[1], "?"]}, None, "invalid_value"),
    (TEXT, {"model": "base", "prompt": "?", "echo": True}, "echo", "invalid_value"),
]


@pytest.mark.parametrize(("path", "body", "param", "code"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests(http, path, body, param, code):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    found = problem(response, 400)
    assert found["type"] == "invalid_request_error"
    if code is not None:
        assert found["code"] == code
    if param not in (None, "body"):
        assert found["param"] == param


def test_it_is_json_that_is_asked_for(http):
    body = json.dumps(GOOD).encode()
    assert problem(http.post(CHAT, content=body, headers={"Content-Type": "text/plain"}), 400)


@pytest.mark.parametrize("model", ["nobody", "../poems", ".", "poems/", "Base", "__base__", "💥"])
def test_there_is_no_such_model(http, model):
    found = problem(http.post(CHAT, json=GOOD | {"model": model}), 404)
    assert (found["param"], found["code"]) == ("model", "model_not_found")
    assert "poems" in found["message"], "it says what there is"


def test_routes_that_are_not_there(http):
    assert problem(http.get("/nothing"), 404)["code"] == "not_found"
    assert problem(http.get(CHAT), 405)["code"] == "method_not_allowed"
    assert http.get(CHAT).headers["allow"] == "POST"
    assert problem(http.delete("/v1/models"), 405)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "right key", "Basic right key", "Bearer right key2", "Bearer \xe9"],
)
def test_no_key_or_a_wrong_one(server, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        response = httpx.get(f"{server.address}{path}", headers=headers)
        assert problem(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert problem(httpx.post(f"{server.address}{CHAT}", headers=headers, content=b"{"), 401)


def test_a_right_key(server):
    for key in ("right key", "another"):
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=key)
        assert client.chat.completions.create(**GOOD).choices[0].message.content is not None
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong").models.list()
    for path in ("/health", "/ready"):
        assert httpx.get(f"{server.address}{path}").status_code == 200, "machines that look have no key"


def test_a_request_that_is_too_large(http):
    big = json.dumps(GOOD | {"user": "x" * 20_000}).encode()
    assert problem(http.post(CHAT, content=big), 413)["code"] == "request_too_large"

    def pieces():
        for place in range(0, len(big), 4096):
            yield big[place : place + 4096]

    assert problem(http.post(CHAT, content=pieces()), 413), "also when its size is not told"
    assert http.get("/health").status_code == 200


def test_a_request_that_does_not_arrive(service, monkeypatch):
    """In the gate alone, with a client that sends half of a body and waits."""
    monkeypatch.setattr(gate, "ARRIVAL", 0.05)
    sent, halves = [], [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive():
        return halves.pop() if halves else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", b"Bearer another")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
    asyncio.run(service.gate(scope, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["message"]


def test_a_full_queue_says_when_to_come_back(http, service, server):
    """Two rows, three places to wait: of ten that want long answers some are sent away."""
    body = {"model": "poems", "messages": user(QUESTIONS[2]), "max_tokens": 60}

    async def all_of_them():
        headers = {"Authorization": "Bearer right key"}
        async with httpx.AsyncClient(base_url=server.address, headers=headers, timeout=60) as client:
            return await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(10)))

    answers = asyncio.run(all_of_them())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 1 <= len(refused) <= 7
    for answer in refused:
        assert problem(answer, 429)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
    assert len({a.json()["choices"][0]["message"]["content"] for a in answers if a.status_code == 200}) == 1


def test_an_answer_that_takes_too_long(tiny_folder, shelf):
    engine = slowed(open_engine(tiny_folder, shelf))
    with running(serve_engine(engine, str(tiny_folder), limits=Limits(seconds=0.3))) as server:
        body = {"model": "poems", "messages": user(QUESTIONS[2]), "max_tokens": 400}
        assert problem(httpx.post(f"{server.address}{CHAT}", json=body), 504)["code"] == "timeout"
        until(lambda: engine.running == 0)
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.APIError, match="in time"):
            list(client.chat.completions.create(**body, stream=True))
        until(lambda: engine.running == 0)


def test_a_model_that_fails(tiny_folder, shelf, monkeypatch):
    engine = open_engine(tiny_folder, shelf)
    monkeypatch.setattr(engine._loop, "_step", lambda: None)
    monkeypatch.setattr(engine.router, "route", lambda prompts: 1 / 0)
    with running(serve_engine(engine, str(tiny_folder))) as server:
        found = problem(httpx.post(f"{server.address}{CHAT}", json=GOOD | {"model": "auto"}), 500)
        assert (found["type"], found["code"]) == ("server_error", "model_failed")


def test_a_server_that_is_told_to_stop_finishes_and_refuses(tiny_folder, shelf, alone):
    engine = open_engine(tiny_folder, shelf)
    service = serve_engine(engine, str(tiny_folder))
    with running(service, grace=20) as server:
        address, found, begun = server.address, [], threading.Event()

        def long():
            body = {"model": "poems", "messages": user(QUESTIONS[2]), "max_tokens": 150, "stream": True}
            with httpx.stream("POST", f"{address}{CHAT}", json=body, timeout=30) as answer:
                for line in answer.iter_lines():
                    begun.set()
                    if line.startswith("data: {"):
                        found.append(json.loads(line[6:])["choices"][0])

        writer = threading.Thread(target=long)
        writer.start()
        assert begun.wait(20)
        server.handle_exit(signal.SIGTERM, None)
        for path in ("/v1/models", "/nothing"):
            refused = httpx.get(f"{address}{path}")
            assert problem(refused, 503)["code"] == "stopping"
            assert refused.headers["retry-after"]
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        writer.join(30)
    text = "".join(choice["delta"].get("content", "") for choice in found)
    assert text == alone("poems", user(QUESTIONS[2]), 150)[0]
    assert found[-1]["finish_reason"] in ("length", "stop")
    assert not engine.alive
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_what_is_not_finished_in_its_time_is_given_up(tiny_folder, shelf):
    engine = slowed(open_engine(tiny_folder, shelf))
    with running(serve_engine(engine, str(tiny_folder)), grace=0.3) as server:
        errors = []

        def long():
            body = {"model": "poems", "messages": user(QUESTIONS[2]), "max_tokens": 400}
            try:
                errors.append(httpx.post(f"{server.address}{CHAT}", json=body, timeout=30).status_code)
            except httpx.HTTPError as error:
                errors.append(error)

        writer = threading.Thread(target=long)
        writer.start()
        until(lambda: engine.running == 1)
    writer.join(20)
    assert len(errors) == 1
    assert errors[0] != 200
    assert not engine.alive
