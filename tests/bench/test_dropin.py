"""`bench dropin` in small: every loss and every run is checked before it is timed."""

import dataclasses

import pytest
import torch

from stablekd_fast.bench.core import WrongResult, check

pytest.importorskip("torchdistill")

from stablekd_fast.bench.runs import dropin

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE = dropin.Noise(dropin.QUICK.count, dropin.QUICK.size)


def test_losses_agree_in_float64():
    cases = list(dropin.loss_cases(dropin.QUICK))
    assert len({case.name for case in cases}) == 9
    for case in cases:
        check(case)


def test_runs_agree_and_another_objective_is_refused(tmp_path, monkeypatch):
    case = dropin.torchdistill_case(dropin.QUICK, NOISE, tmp_path)
    assert [contender.name for contender in case.contenders] == ["theirs", "stablekd", "stablekd, kept teacher"]
    check(case)
    kd, dkd = dropin.mdistiller_cases(dropin.QUICK, NOISE)
    check(kd)
    with pytest.raises(WrongResult, match="mdistiller KD"):
        check(dataclasses.replace(kd, contenders=dkd.contenders))


def test_a_run_begins_anew_each_time():
    theirs = next(dropin.mdistiller_cases(dropin.QUICK, NOISE)).contenders[0].call
    first, again = theirs(), theirs()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first[0][0] != first[0][-1]
