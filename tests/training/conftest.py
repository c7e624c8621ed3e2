"""Makes the shared kits importable, and starts scripts on one or two processes."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import environment


@pytest.fixture
def launch():
    """`launch(script, *arguments, processes=2)` runs a script of `scripts/` and returns what it printed."""

    def start(script: str, *arguments: object, processes: int = 2) -> str:
        command = [sys.executable]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
        command += [str(Path(__file__).parent / "scripts" / script), *map(str, arguments)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    return start
