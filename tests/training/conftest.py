"""Makes the shared kits importable, and starts scripts on one or two processes."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_kit import environment
from warm import Script

SCRIPTS = Path(__file__).parent / "scripts"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def launch(tmp_path_factory):
    """`launch(script, *arguments, processes=2)` runs a script of `scripts/` and returns what it printed.

    The processes are told who they are by the variables that torchrun sets; with `torchrun=True` it is torchrun itself
    that starts them.
    """

    def start(script: str, *arguments: object, processes: int = 2, torchrun: bool = False) -> str:
        words = [str(argument) for argument in arguments]
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
            command += [f"--master-port={free_port()}", str(SCRIPTS / script), *words]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
            return done.stdout
        folder, common = tmp_path_factory.mktemp("launched"), {}
        if processes > 1:
            number = str(processes)
            common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1"}
            common |= {"MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {} for i in range(processes)]
        running = [Script(SCRIPTS / script, words, folder, common | rank) for rank in ranks]
        until = time.monotonic() + 300
        while any(one.poll() is None for one in running):
            if any(one.poll() for one in running) or time.monotonic() > until:
                for one in running:
                    one.send_signal(signal.SIGKILL)  # it would wait for the other one
            time.sleep(0.02)
        said = [one.communicate() for one in running]
        assert not any(one.poll() for one in running), "".join(out[-2000:] + err[-6000:] for out, err in said)
        return "".join(out for out, _ in said)

    return start
