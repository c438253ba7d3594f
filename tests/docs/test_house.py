"""The pages know the house: files and modules that they name exist, and the table of rooms is the tree's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stablekd_fast"
INSTALLED_INSIDE = {"kernels": ROOT / "kernels", "bench": ROOT / "bench"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [
    path
    for top in ("stablekd_fast", "kernels", "bench", "csrc", "docs", "examples", "tests", "configs", ".ci")
    for path in (ROOT / top).rglob("*")
    if path.is_file()
]
ELSEWHERE = {"train.py", "tools/train.py", "stablekd_fast._C"}
"""Files of other repositories, and the C++ core, which has no source of that name."""

NAMED = re.compile(
    r"`([\w./-]+\.(?:py|cpp|h|md|cff|toml)|(?:stablekd_fast|kernels|bench|tests|docs|csrc|examples)/[\w./-]*)`"
)
INSIDE = re.compile(r"(?<![\w./])(?:stablekd_fast|kernels|bench|tests|docs|csrc)/[\w./-]+\.(?:py|cpp|h|md)\b")
DOTTED = re.compile(r"\bstablekd_fast(?:\.\w+)+")


def exists(name, page):
    """Whether a path as a page writes it leads somewhere: from the root, the package, the page, or by its last part."""
    starts = (ROOT, PACKAGE, page.parent)
    return any((start / name).exists() for start in starts) or any(f"/{path}".endswith(f"/{name}") for path in FILES)


def sources():
    """The modules by their dotted names."""
    roots = {"stablekd_fast": PACKAGE, **{f"stablekd_fast.{name}": path for name, path in INSTALLED_INSIDE.items()}}
    for start, root in roots.items():
        for path in root.rglob("*.py"):
            parts = [start, *path.relative_to(root).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


def names_something(dotted, modules):
    """A module, or a name in one."""
    parent, _, last = dotted.rpartition(".")
    return dotted in modules or (parent in modules and re.search(rf"(?<![\w.]){last}\b", modules[parent].read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = {*NAMED.findall(text), *INSIDE.findall(text)} - ELSEWHERE
    assert {name for name in named if not exists(name, page)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_files_are_there(page):
    """Written as `FILE` (`NAME`, `NAME`)."""
    assert list(missing(page.read_text())) == []


def missing(text):
    for file, names in re.findall(r"`([\w/]+\.py)` \((`[^)]+`)\)", text):
        for name in re.findall(r"`(?:\w+\.)*(\w+)`", names):
            if not re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", (PACKAGE / file).read_text(), re.MULTILINE):
                yield file, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_named_exist(page):
    modules = dict(sources())
    named = {*DOTTED.findall(page.read_text())} - ELSEWHERE
    assert {name for name in named if not names_something(name, modules)} == set()


def test_names_of_nothing_are_noticed():
    page = ROOT / "docs" / "architecture.md"
    assert not exists("engine/engine.py", page) and not exists("no_such_file.py", page)
    assert exists("engine/loop.py", page) and exists("loop.py", page) and exists("tests/docs/", page)
    modules = dict(sources())
    assert names_something("stablekd_fast.kernels.kd_loss", modules) and names_something(
        "stablekd_fast.distill", modules
    )
    assert not names_something("stablekd_fast.distiller", modules)
    assert list(missing("`engine/schedule.py` (`Optimizer.lr_at`, `RECIPES`, `no_such_name`)")) == [
        ("engine/schedule.py", "no_such_name")
    ]


def rooms():
    """Rows of the table of rooms: the room's folder (or its file), and the files that the row names."""
    text = (
        (ROOT / "docs" / "architecture.md")
        .read_text()
        .partition("\n## Rooms\n")[2]
        .partition("\nBeside the package:\n")[0]
    )
    for line in re.findall(r"^\| `.*$", text, re.MULTILINE):
        _, room, owns, _ = re.split(r"(?<!\\)\|", line)
        yield ROOT / room.strip(" `"), set(re.findall(r"`(\w+\.py)`", owns)) - {"__init__.py"}


def floors():
    """The rooms of the package by floor, as the contract on imports has them."""
    layers = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    return {room: floor for floor, line in enumerate(re.findall(r'"(.*)"', layers)) for room in line.split(" | ")}


def test_the_table_has_every_room_once_from_the_top_floor_down():
    shown = [path for path, _ in rooms()]
    assert len(shown) == len(set(shown))
    names = [path.relative_to(ROOT if path.parts[len(ROOT.parts)] in INSTALLED_INSIDE else PACKAGE) for path in shown]
    at = floors()
    assert {name.with_suffix("").parts[0] for name in names} == set(at) - {"__main__"}
    order = [at[name.with_suffix("").parts[0]] for name in names]
    assert order == sorted(order)


@pytest.mark.parametrize(("room", "files"), list(rooms()), ids=lambda value: getattr(value, "name", ""))
def test_a_room_s_row_names_its_files(room, files):
    assert room.exists()
    if room.is_dir():
        assert files == {path.name for path in room.glob("*.py")} - {"__init__.py"}


def test_every_folder_with_modules_is_a_room():
    """But for the operators, which the row of kernels/ describes together."""
    shown = {path for path, _ in rooms()}
    folders = {path.parent for path in (*PACKAGE.rglob("*.py"), *(ROOT / "bench").rglob("*.py"))} - {PACKAGE}
    assert folders - shown == set()
