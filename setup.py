"""Builds the C++ core with CMake and Ninja, and archives that repeat; the rest of the package is in pyproject.toml."""

import gzip
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
MOVED = {"stablekd_fast.kernels": "kernels", "stablekd_fast.bench": "bench"}
"""Packages that are installed into another one than the one they lie in, and their folders."""


def packages() -> list[str]:
    """Return all packages: those inside stablekd_fast/, and the rooms at top level that are installed into it."""
    names = find_packages(str(ROOT), include=["stablekd_fast", "stablekd_fast.*"])
    for name, folder in MOVED.items():
        names += [name, *(f"{name}.{inner}" for inner in find_packages(str(ROOT / folder)))]
    return names


class CMakeBuild(build_ext):
    """Builds `stablekd_fast._C`, and goes on without it where no compiler works."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        try:
            self._run_cmake(target.parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            print(f"C++ core not built: {_reason(error)}; the reference path is used.", file=sys.stderr)

    def _run_cmake(self, folder: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", build]):
            subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class RepeatableSdist(sdist):
    """Makes a `.tar.gz` whose bytes depend on what it holds, where SOURCE_DATE_EPOCH gives the time that it carries."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **options):
        made = super().make_archive(base_name, format, root_dir, base_dir, **options)
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch and format == "gztar":
            _set_times(Path(made), int(epoch))
        return made


class RepeatableWheel(bdist_wheel):
    """Makes a wheel whose files have modes that do not depend on the builder's umask."""

    def write_wheelfile(self, *args, **options):
        super().write_wheelfile(*args, **options)
        for path in Path(self.bdist_dir).rglob("*"):  # all is there, and is packed next
            path.chmod(_mode(path.stat().st_mode))


def _set_times(archive: Path, epoch: int) -> None:
    """Write an archive anew, its files in order, all of one time, of nobody, for everybody to read."""
    with tarfile.open(archive) as found:
        files = [(member, found.extractfile(member)) for member in sorted(found.getmembers(), key=lambda m: m.name)]
        contents = [(member, None if file is None else file.read()) for member, file in files]
    with open(archive, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=epoch) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as made:
            for member, content in contents:
                member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
                member.pax_headers = {}
                member.mode = _mode(member.mode)
                made.addfile(member, None if content is None else io.BytesIO(content))


def _mode(found: int) -> int:
    """Return the mode of a file in an archive, whatever its builder's umask: others may do what its owner may."""
    return 0o755 if found & 0o100 else 0o644


def _reason(error: Exception) -> str:
    """Return one line: cmake's own explanation or the compiler's first error, whichever there is."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    explanations = (r"CMake Error[^\n]*\n(.+?)(?:\.\s|\nCall Stack)", r"([^\n]*\berror: [^\n]*)")
    found = next(filter(None, (re.search(pattern, error.output, re.DOTALL) for pattern in explanations)), None)
    return " ".join(found[1].split()) if found else f"cmake failed with exit code {error.returncode}"


setup(
    packages=packages(),
    package_dir=MOVED,
    package_data={
        "stablekd_fast": ["py.typed", "*.pyi"],
        "stablekd_fast.planning": ["devices/*.json"],
        "stablekd_fast.data": ["embedded/*"],
        "stablekd_fast.bench.trust": ["calls.c"],
    },
    ext_modules=[Extension("stablekd_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": RepeatableWheel, "sdist": RepeatableSdist},
)
