"""A process that has loaded everything, and forks for each run: `python -m stablekd_fast.bench.trust.worker`.

It reads one JSON job per line and answers with one line. In a job: `words`, the command's; `roots` and `trouble` for
`calls.py`; `ranks`; `signal`, `[number, seconds]` to send to all ranks after so long; `output`, a file.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import jsonargparse  # noqa: F401 - loaded once, before the forks, as the run is
import torch

from stablekd_fast.bench.trust.calls import Trouble, arm, count
from stablekd_fast.run import distiller  # noqa: F401

LIMIT_SECONDS = 120


def main() -> None:
    """Serve jobs until the input ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_served(json.loads(line))), flush=True)


def _served(job: dict) -> dict:
    port, started = _free_port(), time.monotonic()
    pids = [_forked(job, rank, port) for rank in range(job["ranks"])]
    number, seconds = job.get("signal") or (0, 0.0)
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        after = time.monotonic() - started
        if (number and after > seconds) or after > LIMIT_SECONDS or _one_is_gone(job, codes):
            for pid in pids:
                if pid not in codes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number or signal.SIGKILL)
            number = 0
        time.sleep(0.002)
    return {"codes": [codes[pid] for pid in pids], "seconds": time.monotonic() - started}


def _one_is_gone(job: dict, codes: dict[int, int]) -> bool:
    """Whether a rank was killed: then torchrun kills the others."""
    return job["ranks"] > 1 and -signal.SIGKILL in codes.values()


def _forked(job: dict, rank: int, port: int) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if job["ranks"] > 1:
            meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in meeting.items()}, MASTER_ADDR="localhost")
        arm([Path(root) for root in job["roots"]], Trouble(**(job["trouble"] if rank == 0 else {})))
        code = _command(job["words"])
        if job.get("count"):
            Path(job["count"]).write_text(str(count()))
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(words: list[str]) -> int:
    """Run the command as a user starts it. Returns its exit code."""
    sys.argv = ["stablekd", *words]
    try:
        runpy.run_module("stablekd_fast", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
