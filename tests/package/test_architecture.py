"""The contracts on imports and on sizes hold, and each of them is seen to fail where it is broken."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("stablekd_fast", "kernels", "bench")
LONGEST_FUNCTION, LONGEST_MODULE, LOOSE_MODULES = 60, 400, 6


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The package as it is installed, with kernels/ and bench/ inside, but without the C++ core."""
    folder = tmp_path_factory.mktemp("tree")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "build_py", "--build-lib", folder]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return folder


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_imports_keep_the_contracts(tree):
    found = lint_imports(tree)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "3 kept, 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("contract", "modules"),
    [
        ("Imports point downwards only", {"data/planted.py": "import stablekd_fast.engine"}),
        ("Kernels import nothing of the package but errors", {"kernels/planted.py": "import stablekd_fast.files"}),
        (
            "No circles between the modules of a room",
            {"data/one.py": "import stablekd_fast.data.other", "data/other.py": "import stablekd_fast.data.one"},
        ),
    ],
)
def test_an_import_that_breaks_a_contract_is_refused(tree, contract, modules):
    planted = {tree / "stablekd_fast" / name: f"{line}\n" for name, line in modules.items()}
    for path, text in planted.items():
        assert not path.exists()
        path.write_text(text)
    try:
        found = lint_imports(tree)
    finally:
        for path in planted:
            path.unlink()
    assert found.returncode == 1 and f"{contract} BROKEN" in found.stdout


def long_functions(path: Path, source: str) -> Iterator[str]:
    """Functions that are no Triton kernels."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and "triton" not in path.name:
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION and not any("triton.jit" in ast.unparse(by) for by in node.decorator_list):
                yield f"{path}: {node.name} has {lines} lines"


def long_modules(path: Path, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > LONGEST_MODULE:
        yield f"{path} has {lines} lines"


def docstrings_without_a_subject(path: Path, source: str) -> Iterator[str]:
    """Docstrings of attributes too: every string that stands alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            if node.value.value.split()[:1] == ["Of"]:
                yield f"{path}:{node.lineno}: {node.value.value.splitlines()[0]}"


def loose_modules(package: Path) -> list[str]:
    """The modules outside all rooms, if they are too many."""
    names = sorted(path.name for path in package.glob("*.py"))
    return names if len(names) > LOOSE_MODULES else []


def function(lines: int) -> str:
    """A function of so many lines."""
    return "def planted():\n" + "    x = 0\n" * (lines - 1)


CHECKS = pytest.mark.parametrize("check", [long_functions, long_modules, docstrings_without_a_subject])


@CHECKS
def test_the_modules_keep_to_the_rules(check):
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(paths) > 100
    found = [line for path in paths for line in check(path.relative_to(ROOT), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("check", "name", "source", "count"),
    [
        (long_functions, "planted.py", function(60), 0),
        (long_functions, "planted.py", function(61), 1),
        (long_functions, "planted.py", "class A:\n" + function(61).replace("\n", "\n    ").replace("def", "  def"), 1),
        (long_functions, "planted.py", "@triton.jit\n" + function(61), 0),
        (long_functions, "_triton.py", function(61), 0),
        (long_modules, "planted.py", "\n" * 400, 0),
        (long_modules, "planted.py", "\n" * 401, 1),
        (docstrings_without_a_subject, "planted.py", '"""Often."""\nx = "Of"\n', 0),
        (docstrings_without_a_subject, "planted.py", '"""Of all."""\n', 1),
        (
            docstrings_without_a_subject,
            "planted.py",
            'class A:\n    """\n    Of A."""\n    x: int\n    """Of x."""\n',
            2,
        ),
    ],
)
def test_each_rule_is_seen_to_be_broken(check, name, source, count):
    assert len(list(check(Path(name), source))) == count


def test_few_modules_lie_outside_the_rooms(tmp_path):
    assert not loose_modules(ROOT / "stablekd_fast")
    for number in range(LOOSE_MODULES):
        (tmp_path / f"module{number}.py").touch()
    assert not loose_modules(tmp_path)
    (tmp_path / "one_more.py").touch()
    assert len(loose_modules(tmp_path)) == LOOSE_MODULES + 1
