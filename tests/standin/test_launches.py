"""Triton's launches on the stand-in: bound, specialised and compiled for a real chip as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stablekd_fast import kernels

SCRIPT = Path(__file__).parent / "launches_everywhere.py"
OPERATORS = sorted(path.parent.name for path in Path(kernels.__file__).parent.glob("*/triton_impl.py"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    found = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_launch_is_on_the_device_and_stream_of_its_operands(launched, operator):
    """All operands lie on cuda:1, whose current stream is one of its own, while cuda:0 is the current device."""
    calls = [one for one in launched if one[0].removesuffix("_with_grad").removesuffix("_backward") == operator]
    assert calls
    for name, launches, failure in calls:
        assert failure is None, failure
        assert launches, name
        assert all(launch[:2] == [1, True] for launch in launches), (name, launches)
