"""`retain chat` and `retain serve`, as they are typed."""

from __future__ import annotations

import io
import logging
import signal
import sys

import httpx
import openai
import pytest
from expert_kit import library
from serving_kit import Alone, ByWord, until, user
from warm import command

from retain.cli import main
from retain.experts import opening
from retain.experts.conversation import Conversation, explained


@pytest.fixture(scope="module")
def shelf(tiny_folder, tmp_path_factory):
    return library(tiny_folder, tmp_path_factory.mktemp("shelf") / "experts")


@pytest.fixture(scope="module")
def alone(tiny_folder, shelf):
    return Alone(tiny_folder, shelf)


@pytest.fixture
def typed(shelf, monkeypatch, capsys):
    """Runs a command; gives its exit code, standard output and standard error."""
    monkeypatch.setattr(opening, "router_of", lambda library, *rest: ByWord(library.names()))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        monkeypatch.setattr(sys, "argv", ["retain", *words, "--library", str(shelf.folder)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


def test_one_question(typed, alone):
    code, out, err = typed("chat", "--ask", "of poems", "--max-tokens", "6")
    assert code == 0
    assert out.rstrip("\n") == alone("poems", user("of poems"), 6)[0] + " …"
    assert "poems · 90% sure" in err


def test_a_named_expert_answers_one_question(typed, alone):
    _, out, err = typed("chat", "--ask", "of poems", "--expert", "medicine", "--max-tokens", "6")
    assert out.rstrip("\n") == alone("medicine", user("of poems"), 6)[0] + " …"
    assert "sure" not in err


def test_a_conversation_from_a_pipe(typed, alone):
    lines = (
        "/why\nof poems\n/why\n/expert medicine\nand now?\n/base\n/nonsense\n/expert nobody\n\n/auto\n/quit\nnever\n"
    )
    code, out, _ = typed("chat", "--max-tokens", "5", lines=lines)
    assert code == 0
    first = alone("poems", user("of poems"), 5)[0]
    talk = [*user("of poems"), {"role": "assistant", "content": first}, *user("and now?")]
    parts = ["Nobody has answered yet.", "poems · 90% sure", first, "poems, 90% sure: it says poems (poems 90%)"]
    parts += ["medicine answers.", alone("medicine", talk, 5)[0], "The base answers.", "/nonsense: no such command"]
    parts += ["unknown 'nobody'", "The router chooses."]
    place = 0
    for part in parts:
        place = out.index(part, place) + len(part)
    assert "never" not in out


def test_what_was_said_is_cut_where_it_has_become_too_long(shelf, tiny_folder):
    from serving_kit import open_engine

    engine = open_engine(tiny_folder, shelf).start()
    talk = Conversation(engine, limit=20)
    for number in range(8):
        assert list(talk.ask(f"{number} " + "ships " * 40))
    assert 2 < len(talk.said) < 16
    assert talk.said[-2]["content"].startswith("7 ")
    assert talk.said[0]["role"] == "user"
    assert talk.last
    assert explained(talk.last).startswith("base, 90% sure")
    talk.command("/new")
    assert talk.said == []
    engine.stop()


def test_mistakes_are_one_line(typed, tmp_path, monkeypatch):
    code, _, err = typed("chat", "--ask", "?", "--expert", "nobody")
    assert code == 2
    assert "unknown 'nobody'" in err


@pytest.mark.parametrize("name", ["chat", "serve"])
def test_that_nobody_is_there_is_said_before_anything_is_loaded(name, tmp_path, monkeypatch, capsys):
    for slow in ("retain.experts.opening", "retain.experts.server.app"):
        monkeypatch.setitem(sys.modules, slow, None)  # importing it would be an error
    monkeypatch.setattr(sys, "argv", ["retain", name, "--library", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no experts here" in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_stop(shelf, alone, tmp_path):
    """A process of its own, a signal, and exit code 0."""
    words = ["serve", "--port", "0", "--library", str(shelf.folder), "--key", "one", "--router", "none"]
    more = {"RETAIN_API_KEYS": "two, three", "COLUMNS": "200"}
    process = command([*words, "--max-tokens", "9"], tmp_path, more)
    try:
        until(lambda: process.poll() is not None or "http://" in process.said(), 120)
        line = next(line for line in process.said().splitlines() if "http://" in line)
        url = line.split()[0]
        assert url.startswith("http://127.0.0.1:"), process.said()
        assert "base, history.v2, medicine, poems" in line
        for key in ("one", "two", "three"):
            client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
            found = client.chat.completions.create(model="medicine", messages=user("?"), max_tokens=4)
            assert found.choices[0].message.content == alone("medicine", user("?"), 4)[0]
        assert httpx.get(f"{url}/models").status_code == 401
        process.send_signal(signal.SIGTERM)
        process.communicate(30)
        assert process.returncode == 0
    finally:
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("host", "public"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)]
)
def test_which_addresses_others_can_reach(host, public):
    from retain.experts.server import running

    assert running.public(host) == public


def test_a_public_address_without_keys_is_warned_of(typed, monkeypatch):
    from retain.experts.server import running

    monkeypatch.setattr(running.Server, "run", lambda server: None)
    monkeypatch.delenv("RETAIN_API_KEYS", raising=False)
    closed = []
    handler = logging.NullHandler()
    monkeypatch.setattr(handler, "close", lambda: closed.append(handler))
    assert "can be reached by others" in typed("serve", "--host", "0.0.0.0")[1]
    assert "can be reached by others" not in typed("serve", "--host", "0.0.0.0", "--key", "k")[1]
    assert "can be reached by others" not in typed("serve")[1]
    assert not closed, "the program's own logging goes on"
