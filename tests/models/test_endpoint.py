"""Writing through a server: requests and answers of the OpenAI form, order, retries, and errors in one line."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from retain.errors import ConfigError, ModelError
from retain.models.endpoint import Endpoint


class Stub:
    """A server on this machine; `reply(route, body, count)` gives (status, JSON or text). Notes what it was asked."""

    def __init__(self, reply):
        self.requests, self.lock = [], threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.requests.append((self.path, body, self.headers.get("Authorization")))
                    count = len(stub.requests)
                status, answer = reply(self.path, body, count)
                payload = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def said(text, finish="stop"):
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": {"completion_tokens": 3}}


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    stubs = []

    def start(reply):
        stubs.append(Stub(reply))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


def turns(text):
    return [{"role": "user", "content": text}]


def test_answers_come_in_the_order_of_the_prompts(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "hush")
    stub = serve(lambda route, body, count: (200, said(f" re: {body['messages'][-1]['content']} ")))
    answers = Endpoint(stub.url + "/", "some-model", "MY_KEY", parallel=8)(
        [turns(f"p{i}") for i in range(30)], 20, 0.7, 0.9, 5
    )
    assert [a.text for a in answers] == [f"re: p{i}" for i in range(30)]
    assert all(a.finished and a.tokens == 3 for a in answers)
    path, body, secret = stub.requests[0]
    assert path == "/v1/chat/completions"
    assert secret == "Bearer hush"
    wanted = {"model": "some-model", "max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert {k: body[k] for k in wanted} == wanted


def test_plain_text_goes_to_the_other_route_and_no_key_is_fine(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stub = serve(lambda route, body, count: (200, {"choices": [{"text": "x", "finish_reason": "length"}]}))
    (answer,) = Endpoint(stub.url, "m")(["<|im_start|>user\n"], 8, 0.0, 0.9, 0)
    assert not answer.finished
    path, body, secret = stub.requests[0]
    assert (path, body["prompt"], secret) == ("/v1/completions", "<|im_start|>user\n", None)
    assert "top_p" not in body, "greedy"


def test_a_busy_server_is_asked_again(serve):
    stub = serve(lambda route, body, count: (503, "busy") if count < 3 else (200, said("ok")))
    assert Endpoint(stub.url, "m", pauses=(0, 0, 0))([turns("p")], 8, 0, 1, 0)[0].text == "ok"
    assert len(stub.requests) == 3


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        ((401, "no such key"), r"answered 401 \(no such key\)\. The key is read from .* MY_KEY", 1),
        ((404, "model not\nfound"), r"answered 404 \(model not found\)", 1),
        ((500, "broken"), r"answered 500", 3),
        ((200, "<html>"), "no usable answer", 1),
        ((200, {"choices": []}), "not of the OpenAI form", 1),
        ((200, {"error": "x"}), "not of the OpenAI form", 1),
    ],
)
def test_errors_are_one_line(serve, answer, message, requests):
    stub = serve(lambda route, body, count: answer)
    with pytest.raises(ModelError, match=message) as caught:
        Endpoint(stub.url, "m", "MY_KEY", pauses=(0, 0))([turns("p")], 8, 0, 1, 0)
    assert "\n" not in str(caught.value)
    assert len(stub.requests) == requests


def test_nobody_there():
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/v1/chat/completions: no usable answer .*Start the server"):
        Endpoint("http://127.0.0.1:9/v1", "m", pauses=())([turns("p")], 8, 0, 1, 0)
    with pytest.raises(ConfigError, match=r"endpoint\.url"):
        Endpoint("127.0.0.1:9", "m")
