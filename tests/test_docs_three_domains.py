"""The page that walks from rows to answers runs as it stands: training, routing, a real server, curl, a client."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from run_kit import environment

from retain.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "three_domains.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROWS = {
    "medical": ("How many {} tablets may a patient take?", "At most {} a day."),
    "legal": ("Who signs the {} contract?", "Both parties sign it, on page {}."),
    "cooking": ("How long does the {} dough rest?", "For {} minutes in the oven."),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page asks with curl")
def test_from_rows_to_curl(tmp_path, tiny_cache, thin_suites, monkeypatch, capsys, fresh_precision):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name, (question, answer) in ROWS.items():
        words = ("red", "small", "old", "first", "soft", "plain", "large", "new", "thin", "last", "cold", "sweet") * 2
        rows = [{"prompt": question.format(f"{w} {i}"), "response": answer.format(i)} for i, w in enumerate(words)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server, said = None, []
    try:
        for kind, text in FENCE.findall(PAGE.read_text(encoding="utf-8").replace("8000", port)):
            if kind == "py":
                exec(compile(text, str(PAGE), "exec"), {})
                assert capsys.readouterr().out.split()[0] == "law"
            for line in text.replace("\\\n", " ").splitlines() if kind == "sh" else ():
                words = shlex.split(line)
                if words[-1] == "&":
                    server = subprocess.Popen([sys.executable, "-m", *words[:-1]], env=environment())
                    wait_for(f"http://127.0.0.1:{port}/ready", server)
                elif words[0] == "curl":
                    said.append(subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout)
                else:
                    fresh_precision()
                    monkeypatch.setattr(sys, "argv", words)
                    with pytest.raises(SystemExit) as ended:
                        main()
                    out = capsys.readouterr()
                    assert not ended.value.code, f"{line}\n{out.out[-2000:]}\n{out.err[-2000:]}"
        assert server is not None
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        if server is not None and server.poll() is None:
            server.kill()
    models, routed, stream = said
    assert {"auto", "medicine", "law", "cooking"} <= {model["id"] for model in json.loads(models)["data"]}
    assert json.loads(routed)["retain"]["expert"] == "law"
    assert stream.rstrip().endswith("data: [DONE]")
    first = json.loads(stream.split("data: ")[1])["retain"]
    assert (first["expert"], first["confidence"]) == ("law", 1.0)
    assert (tmp_path / "for-vllm" / "serve.sh").is_file()
    assert (tmp_path / "both" / "adapter_config.json").is_file()


def wait_for(address: str, server: subprocess.Popen, seconds: float = 120) -> None:
    """Until a server answers; it has ended before that when something is wrong."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None
        try:
            if httpx.get(address).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{address} did not answer in {seconds:g} s")
