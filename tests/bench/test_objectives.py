"""`bench objectives` in small: a step of each method, checked before it is timed."""

from stablekd_fast.bench.runs.objectives import ALONE, NEEDS_MORE, methods, run_objectives
from stablekd_fast.bench.runs.teacher import Pair
from stablekd_fast.objectives import METHODS


def test_a_step_of_every_method_is_timed_beside_one_without_a_teacher():
    shown = []
    pair = Pair("resnet8", "resnet8", 8, 16, batches=1)
    measured = run_objectives("digits", "fp32", 1, shown.extend, pair)
    assert not measured.refused
    assert shown[0]["contender"] == ALONE and {row["contender"] for row in shown} == set(methods())
    assert set(methods()) | set(NEEDS_MORE) >= {name for name, one in METHODS.items() if one.stages == "end to end"}
