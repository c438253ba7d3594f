import pytest

from stablekd_fast import models
from stablekd_fast.bench.runs.scale import check_losses, run_scale
from stablekd_fast.engine.checkpoint import save_tensors
from stablekd_fast.errors import StableKDError


@pytest.mark.slow
def test_speeds_of_one_and_two_ranks_in_small(tmp_path):
    weights = tmp_path / "teacher.safetensors"
    save_tensors(weights, models.build("resnet20", 10, 8).state_dict(), {})
    settings = (
        f"--data digits --teacher resnet20 --teacher-weights {weights} --student resnet20 --subset 128 --validation 0 "
        "--epochs 2 --views 1 --batch-size 32 --evaluate-every 0 --bn-images 32 --log-every 1 --precision fp32 "
        "--parallel blocks"
    )
    shown = {}
    rows = run_scale(settings.split(), [1, 2], 1, tmp_path, shown.__setitem__)
    speeds = shown["images per second"]
    assert [(row["case"], row["contender"]) for row in speeds] == [
        (f"stage {stage}", f"{ranks} rank(s)") for stage in (1, 2) for ranks in (1, 2)
    ]
    assert all(row["images_per_second"] > 0 for row in speeds) and speeds[0]["ratio"] == 1
    apart, merged = ([row for row in rows if row.get("stage") == stage] for stage in (0, 1))
    assert [row["gradient_bytes"] for row in apart] == [0, 0] and all(row["gradient_bytes"] > 0 for row in merged)


def test_ranks_that_train_something_else_show_no_speed():
    one, near = ([{"step": 1, "losses": {"1": 0.5, "2": loss}}] for loss in (0.25, 0.26))
    check_losses(one, one, 2, 0.0)
    check_losses(one, near, 2, 0.1)
    with pytest.raises(
        StableKDError, match="On 2 ranks the loss of blocks 2 at step 1 is 0.26, in the first run 0.25: no speed"
    ):
        check_losses(one, near, 2, 0.0)
    with pytest.raises(StableKDError, match="no speed"):
        check_losses(one, [{"step": 1, "losses": {"1": 0.5, "2": 0.3}}], 2, 0.1)
