"""`bench own-loop` in small: its loops compute the same, before any is timed."""

import dataclasses

import pytest

from stablekd_fast.bench.core import WrongResult, check
from stablekd_fast.bench.runs import own_loop
from stablekd_fast.bench.runs.alike import Noise

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loops_agree_and_others_are_refused(tmp_path):
    case = own_loop.own_loop_case(own_loop.QUICK, Noise(own_loop.QUICK.count, own_loop.QUICK.size), tmp_path)
    names = [contender.name for contender in case.contenders]
    assert names == ["written by hand", "Blockwise", "Blockwise, kept teacher", "student alone"]
    check(case)
    alone = dataclasses.replace(case.contenders[-1], expected=None)
    with pytest.raises(WrongResult, match="student alone"):
        check(dataclasses.replace(case, contenders=[alone]))
