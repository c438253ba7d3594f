"""Processes of their own that begin with torch and the engine loaded, seconds sooner than an interpreter does.

A server that has imported both forks them (`multiprocessing` calls it a fork server); each process of tests has its
own server. What an interpreter's start imports or changes they do not show: where that is asked, a test starts one.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

LOADED = ["stablekd_fast.cli", "stablekd_fast.run.distiller", "stablekd_fast.selftest", "sklearn.datasets", "pytest"]
WORK = "a forked process"


class Forked:
    """Stands for `subprocess.Popen([sys.executable, *words], env=..., cwd=...)` with one pipe for output and errors.

    `words` begin with the path of a script, with `-m` and a module, or with `-c` and code. `environment` is added to
    that of the test.
    """

    def __init__(self, *words: object, environment: dict[str, str] | None = None, folder: Path | None = None) -> None:
        self._output = tempfile.NamedTemporaryFile()
        told = {**os.environ, **(environment or {})}
        asked = [str(word) for word in words], told, str(folder or Path.cwd()), self._output.name
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        # The child imports nothing of these tests by name: pytest alone knows where they are.
        self._process = context.Process(target=runpy.run_path, args=(__file__, {"asked": asked}, WORK))
        # What the server finds when it is started: one thread, and no word of measuring which lines it runs.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", COVERAGE_PROCESS_START=""):
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, -N after signal N. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self.returncode

    def said(self) -> str:
        """Return what it has written so far."""
        return Path(self._output.name).read_text(errors="replace")

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.said(), None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()  # which is nothing where it has ended


def output_of(*words: object, timeout: float = 120) -> str:
    """Return what a forked process said; fails if the process did."""
    process = Forked(*words)
    assert process.wait(timeout) == 0, process.said()
    return process.said()


def _work(words: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """Become what `python WORDS` would be, with the signals of a shell's process in the foreground."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if os.environ.get("COVERAGE_PROCESS_START"):
        import coverage

        coverage.process_startup()
    try:
        _run(words)
    finally:
        atexit._run_exitfuncs()  # a forked process of `multiprocessing` leaves them out


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == WORK:
    _work(*globals()["asked"])
