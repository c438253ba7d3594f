"""A copy of the repository in which bugs are put, and tests are run against them by processes that start warm."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
SITE = """\
import os
if os.environ.get("COVERAGE_PROCESS_START"):
    import coverage
    coverage.process_startup()
"""
_FORK = multiprocessing.get_context("fork")


class Sandbox:
    """A copy of what the repository holds now, in a folder that is made anew.

    `packages` lies before everything else on the path of its processes: there the package is laid out as it is
    installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree, self.packages = folder, folder / "tree", folder / "packages"
        shutil.rmtree(folder, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        built = [str(path.relative_to(ROOT)) for path in (ROOT / "stablekd_fast").glob("_C.*.so")]
        for name in {*listed.stdout.decode().split("\0"), *built} - {""}:
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        self.packages.mkdir()
        (self.packages / "sitecustomize.py").write_text(SITE)
        (self.packages / "stablekd_fast").symlink_to(self.tree / "stablekd_fast")
        for inner in ("bench", "kernels"):
            (self.tree / "stablekd_fast" / inner).symlink_to(self.tree / inner)

    @contextlib.contextmanager
    def changed(self, path: str, change: Callable[[bytes], bytes]) -> Iterator[None]:
        """A file is another one until the block ends."""
        before = (self.tree / path).read_bytes()
        (self.tree / path).write_bytes(change(before))
        try:
            yield
        finally:
            (self.tree / path).write_bytes(before)

    def build(self) -> int:
        """Compile what has changed of the C++ core. Returns the status of the build."""
        import pybind11

        configure = [
            "cmake", "-S", self.tree, "-B", self.folder / "build", "-G", "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.tree / 'stablekd_fast'}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        done = 0 if (self.folder / "build").exists() else subprocess.run(configure, check=False).returncode
        return done or subprocess.run(["cmake", "--build", self.folder / "build"], check=False).returncode

    def start(self, work: Callable[[], int], log: Path, environment: dict[str, str] | None = None) -> Running:
        """Start a process in the sandbox that calls `work`; its exit status is what that returns."""
        return Running(self, work, log, environment or {})


class Running:
    """A process in a sandbox, with all the processes that it starts."""

    def __init__(self, sandbox: Sandbox, work: Callable[[], int], log: Path, environment: dict[str, str]) -> None:
        self._sandbox, self.began = sandbox, time.monotonic()
        self._process = _FORK.Process(target=self._enter, args=(sandbox, work, log, environment))
        self._process.start()

    @staticmethod
    def _enter(sandbox: Sandbox, work: Callable[[], int], log: Path, environment: dict[str, str]) -> None:
        os.setsid()
        with open(log, "wb") as file, open(os.devnull) as nothing:
            for stream, number in ((nothing, 0), (file, 1), (file, 2)):
                os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(sandbox.tree)
        packages = str(sandbox.packages)
        temporary = sandbox.folder / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        os.environ.update(environment, PYTHONPATH=packages, TMPDIR=str(temporary))
        sys.path[:] = [packages, *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent)]
        status = work()
        sys.stdout.flush()
        os._exit(status)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def status(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> None:
        """Wait for its end, so long at most."""
        self._process.join(seconds)

    def end(self) -> None:
        """Kill whatever is left of it."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.join()
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and self._is_of_sandbox(process):
                os.kill(int(process.name), signal.SIGKILL)

    def _is_of_sandbox(self, process: Path) -> bool:
        """Whether a process, of a session of its own perhaps, was started by one of the sandbox."""
        try:
            return b"PYTHONPATH=" + str(self._sandbox.packages).encode() in (process / "environ").read_bytes()
        except OSError:
            return False


def warm() -> None:
    """Import what tests need beside the package, before processes are forked: they then start in a second."""
    os.environ.update(ENVIRONMENT)
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch.distributed
    import torch.utils.data  # noqa: F401
    import torchvision  # noqa: F401

    assert "stablekd_fast" not in sys.modules, "the package must be imported in the sandbox only"
