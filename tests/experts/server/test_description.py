"""The interface is as its own description says: requests drawn from it find nothing else."""

from __future__ import annotations

import gc
import os
import tracemalloc

import httpx
import openai
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from serving_kit import QUESTIONS, open_engine, running, until, user

from retain.experts.server.app import Limits, serve_engine


@pytest.fixture(scope="module")
def server(tiny_folder, shelf):
    engine = open_engine(tiny_folder, shelf, rows=8, waiting=200)
    with running(serve_engine(engine, str(tiny_folder), limits=Limits(max_tokens=8, seconds=30))) as server:
        yield server


OPERATIONS = [
    *[("POST", path) for path in ("/v1/chat/completions", "/v1/completions")],
    *[("GET", path) for path in ("/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics")],
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[path for _, path in OPERATIONS])
def test_requests_drawn_from_the_description(server, method, path, mode):
    """Statuses, headers and bodies are as described, nothing is a 500, and what is wrong is refused."""
    operation = schemathesis.openapi.from_url(f"{server.address}/openapi.json")[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("there is nothing to be wrong")

    @settings(max_examples=20 if method == "POST" else 5, deadline=None, derandomize=True, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate()
        if method == "POST" and mode is GenerationMode.POSITIVE:  # a drawn name is nobody's, and the end of it
            case.body["model"] = "base"
            answer = case.call_and_validate(excluded_checks=[CHECKS.get_one("positive_data_acceptance")])
            if answer.status_code != 200:
                limits = ("context", "at most 8 here", "the model has")
                assert any(limit in answer.json()["error"]["message"] for limit in limits), answer.text

    check()


def test_the_description_has_our_errors_only(server):
    found = httpx.get(f"{server.address}/openapi.json").json()
    assert set(found["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics",
    }  # fmt: skip
    for path in found["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    assert "HTTPValidationError" not in found["components"]["schemas"]


@pytest.mark.slow
def test_memory_is_flat_over_1000_requests(server):
    """Of all kinds, a tenth of which leave; after 300 of them nothing is kept for each."""
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0)
    names = ["base", "medicine", "poems", "auto"]

    def some(count):
        for i in range(count):
            common = {"model": names[i % 4], "messages": user(f"{QUESTIONS[i % 4]} {i}"), "max_tokens": 2 + i % 3}
            if i % 10 == 0:
                stream = client.chat.completions.create(**common, stream=True)
                next(iter(stream))
                stream.close()
            elif i % 10 == 1:
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(**common, top_p=7)
            elif i % 10 == 2:
                assert list(client.chat.completions.create(**common, stream=True))
            else:
                assert client.chat.completions.create(**common).choices
        until(lambda: "retain_running 0.0" in httpx.get(f"{server.address}/metrics").text)
        gc.collect()

    process = psutil.Process(os.getpid())
    some(300)
    tracemalloc.start()
    try:
        some(20)
        before, resident = tracemalloc.get_traced_memory()[0], process.memory_info().rss
        some(700)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    # one kept ask, ticket and row with its text are more than a kilobyte; a kept cache of keys and values 20
    assert grown < 200 * 700, f"{grown:,} bytes"
    assert process.memory_info().rss - resident < 20_000 * 700
