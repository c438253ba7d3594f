"""Wheel, sdist and editable installs as the build backend makes them, with a C++ compiler and without one."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "stablekd_fast", "kernels", "bench", "csrc",
    "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE",
)  # fmt: skip
AUGMENT = """
import torch
from stablekd_fast import kernels
images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
batch = kernels.augment_batch(
    images, torch.tensor([1]), torch.tensor([[1, 1]]), torch.tensor([True]), padding=1, mean=[0] * 3, std=[1] * 3
)
assert torch.equal(batch[0].permute(1, 2, 0).flip(1), images[1] / 255)
print(kernels.implementations()["augment_batch"])
"""


def run(*command, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed; this interpreter's scripts (cmake, ninja) are on its path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def build(kind: str, source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """Run the backend's `build_<kind>` in `source`: the file it made in `out`, and what it printed."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    printed = run(sys.executable, "-c", code, cwd=source, **environment)
    (made,) = out.iterdir()
    return made, printed


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where the C++ core cannot be built: no compiler, or Python without its headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not (shutil.which(os.environ.get("CXX", "c++")) and headers.exists()):
        pytest.skip("needs a C++ compiler and Python's headers")


COMPILER = """#!/bin/sh
object=
for word; do
    [ "$before" = -o ] && object=$word
    before=$word
done
kept=$(dirname "$0")/$(echo "$@" | sed 's# [^ ]*/csrc# csrc#g; s#-I[^ ]*/csrc#-Icsrc#g' | md5sum | cut -c1-32)
case " $* " in
    *" -c "*csrc/*) [ -e "$kept" ] || { REAL "$@" -O0 && cp "$object" "$kept"; } && cp "$kept" "$object" ;;
    *) exec REAL "$@" -O0 ;;
esac
"""


@pytest.fixture(scope="session")
def unoptimised(tmp_path_factory) -> dict[str, str]:
    """The environment of a build whose compiler optimises nothing, which takes a quarter of the time, and keeps what it
    made of a file of the core by the same words: the copies of the sources are the same.

    These tests ask what is built and how it is linked; what the core computes is tested on the one that is installed.
    """
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(COMPILER.replace("REAL", os.environ.get("CXX", "c++")))
    script.chmod(0o755)
    return {"CXX": str(script)}


@pytest.fixture
def source(tmp_path) -> Path:
    """A clean copy of what is built, without anything that was built before."""
    return copy_sources(tmp_path / "source")


def copy_sources(folder: Path) -> Path:
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def unpacked_sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    archive, _ = build("sdist", copy_sources(folder / "source"), folder / "dist")
    with tarfile.open(archive) as files:
        files.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    return root


@pytest.fixture(scope="session")
def wheel(unpacked_sdist, unoptimised, tmp_path_factory) -> Path:
    made, _ = build("wheel", unpacked_sdist, tmp_path_factory.mktemp("wheel"), **unoptimised)
    return made


def run_installed(target: Path, code: str) -> str:
    """Run Python code against the package unpacked at `target`, and nothing of another installation."""
    # An editable install of the package in this environment would lend its modules to this one.
    guard = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import stablekd_fast
"""
    guard += f"assert stablekd_fast.__file__.startswith({str(target)!r})\n"
    return run(sys.executable, "-c", guard + code, cwd=target, PYTHONPATH=str(target))


def names_in(wheel):
    return zipfile.ZipFile(wheel).namelist()


def python_files(folder, installed_as):
    return {f"{installed_as}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}


def test_wheel_holds_every_module_and_the_licence(wheel):
    names = names_in(wheel)
    expected = (
        python_files("stablekd_fast", "stablekd_fast")
        | python_files("kernels", "stablekd_fast/kernels")
        | python_files("bench", "stablekd_fast/bench")
    )
    assert {name for name in names if name.endswith(".py")} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    profiles = {
        f"stablekd_fast/planning/devices/{path.name}" for path in (ROOT / "stablekd_fast/planning/devices").iterdir()
    }
    assert profiles and profiles <= set(names)


def test_wheel_carries_the_core_and_no_openmp_runtime(compiler, wheel, tmp_path):
    binaries = [name for name in names_in(wheel) if ".so" in name]
    assert len(binaries) == 1 and binaries[0].startswith("stablekd_fast/_C.")
    dynamic = subprocess.run(
        ["readelf", "-d", unpack(wheel, tmp_path) / binaries[0]], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in dynamic and "omp" not in dynamic


def test_installed_core_shares_the_one_openmp_runtime(compiler, wheel, tmp_path):
    code = """
import os, torch
before = torch.get_num_threads(), dict(os.environ)
import stablekd_fast.kernels
assert (torch.get_num_threads(), dict(os.environ)) == before and not torch.cuda.is_initialized()
from stablekd_fast.kernels._native import openmp_runtimes
assert len(openmp_runtimes()) == 1, openmp_runtimes()
"""
    assert "'C++ core, " in run_installed(unpack(wheel, tmp_path), code + AUGMENT)


def test_without_a_compiler_the_reference_serves(source, tmp_path):
    wheel, printed = build("wheel", source, tmp_path / "dist", CXX="/bin/false")
    assert printed.count("C++ core not built: ") == 1 and "the reference path is used" in printed
    assert not any("_C." in name for name in names_in(wheel))
    printed = run_installed(unpack(wheel, tmp_path / "installed"), AUGMENT)
    assert "'reference'" in printed and "No module named 'stablekd_fast._C'" in printed


def test_editable_install_maps_the_rooms_and_builds_the_core_in_place(compiler, source, unoptimised, tmp_path):
    wheel, _ = build("editable", source, tmp_path / "dist", **unoptimised)
    assert list((source / "stablekd_fast").glob("_C.*.so"))
    (finder,) = (name for name in names_in(wheel) if name.endswith("_finder.py"))
    mapping = zipfile.ZipFile(wheel).read(finder).decode()
    for package, folder in (("stablekd_fast", "stablekd_fast"), ("stablekd_fast.kernels", "kernels")):
        assert f"'{package}': '{source / folder}'" in mapping
