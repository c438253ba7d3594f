"""The bugs that the mutation campaign puts in are bugs of the sources as they are."""

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")

ROOT = Path(__file__).parents[2]
BUGS = [bug for room in tomllib.loads((ROOT / "tests/mutation/bugs.toml").read_text()).values() for bug in room]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug["kind"])
def test_each_bug_has_its_place(bug):
    """A change of the source that moves it must move the bug too, or nobody would notice that it is no longer tried."""
    assert bug["before"] in (ROOT / bug["path"]).read_text()
    assert bug["before"] != bug["after"]
