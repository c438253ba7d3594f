import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import Forked

WORKER = Path(__file__).parent / "worker.py"
SETTINGS = {"OMP_NUM_THREADS": "1"}
"""What the processes find in their environment besides that of the test."""


def torchrun(ranks: int, *arguments: object, restarts: int = 0) -> subprocess.Popen:
    """Real processes, started as a user starts them."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        "--max-restarts",
        restarts,
    ]
    return subprocess.Popen(
        [str(word) for word in [*command, "--monitor-interval", 0.1, WORKER, *arguments]],
        env={**os.environ, **SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def together(ranks: int, *arguments: object) -> list[Forked]:
    """Processes of one run, without an agent that ends all of them when one ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {**SETTINGS, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        Forked(WORKER, *arguments, environment={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def alone(*arguments: object) -> Forked:
    return Forked(WORKER, *arguments, environment=SETTINGS)


def finished(*processes: Forked | subprocess.Popen, timeout: float = 240) -> str:
    """The outputs of processes when they have ended; fails if one of them did."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return "".join(outputs)


@pytest.fixture(scope="session", name="launch")
def launch_fixture(digits_file):
    """How tests start the processes of a run, and wait for them."""
    SETTINGS["DIGITS"] = str(digits_file)
    return SimpleNamespace(torchrun=torchrun, together=together, alone=alone, finished=finished)
