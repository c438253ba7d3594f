import itertools

import pytest
import torch

from stablekd_fast.engine.schedule import Optimizer, Stage, merge_neighbours, method_stages, plan_stages
from stablekd_fast.errors import ConfigError


def test_neighbours_merge_two_by_two():
    assert merge_neighbours(4) == [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]]
    assert merge_neighbours(5)[1:] == [[[0, 1], [2, 3], [4]], [[0, 1, 2, 3], [4]], [[0, 1, 2, 3, 4]]]
    assert merge_neighbours(1) == [[[0]]]


def test_the_paper_recipe_is_the_draft_s():
    stages = method_stages("stablekd", 5, "paper")
    assert [stage.name for stage in stages] == ["1|2|3|4|5", "1+2|3+4|5", "1+2+3+4|5"]
    assert [stage.optimizer.lr for stage in stages] == [0.5, 0.25, 0.125]
    assert {stage.optimizer.cycle for stage in stages} == {"triangular"}
    assert {stage.optimizer.weight_decay for stage in stages} == {5e-4}
    longer = method_stages("stablekd", 5, "paper-end-to-end")
    assert [stage.name for stage in longer[:3]] == [stage.name for stage in stages]
    assert longer[3].name == "1+2+3+4+5" and longer[3].optimizer.lr == 0.0625


def test_the_default_recipe_trains_blocks_alone_and_then_gently_end_to_end():
    apart, merged = method_stages("stablekd", 4, optimizer=Optimizer(lr=0.04, weight_decay=0.01))
    assert (apart.name, merged.name) == ("1|2|3|4", "1+2+3+4")
    assert (apart.share, merged.share) == (0.75, 0.25)
    assert (apart.optimizer.lr, merged.optimizer.lr) == (0.04, pytest.approx(0.004))
    assert apart.optimizer.weight_decay == merged.optimizer.weight_decay == 0.01
    (alone,) = method_stages("stablekd", 1)
    assert alone.name == "1"


def test_the_progressive_recipe_merges_two_by_two_and_halves_the_rate():
    stages = method_stages("stablekd", 4, "progressive", Optimizer(lr=0.04))
    assert [stage.name for stage in stages] == ["1|2|3|4", "1+2|3+4", "1+2+3+4"]
    assert [stage.optimizer.lr for stage in stages] == [0.04, 0.02, 0.01]
    assert len({stage.share for stage in stages}) == 1


@pytest.mark.parametrize(
    ("method", "name"), [("kd", "1+2+3"), ("kd+features", "1+2+3"), ("ce", "1+2+3"), ("blocks", "1|2|3")]
)
@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_other_methods_have_one_stage_whatever_the_recipe(method, name, recipe):
    (stage,) = method_stages(method, 3, recipe, Optimizer(lr=0.5))
    assert stage.name == name and stage.optimizer.lr == 0.5


def test_stages_fill_the_run_exactly():
    for total in (3, 7, 100, 101):
        planned = plan_stages(method_stages("stablekd", 4), 4, total, 10)
        assert planned[0].first == 0 and planned[-1].last == total
        assert all(a.last == b.first for a, b in itertools.pairwise(planned))


def test_lengths_may_be_mixed():
    stages = [
        Stage([[0], [1]], steps=7),
        Stage([[0], [1]], epochs=2),
        Stage([[0, 1]], share=1.0),
    ]
    assert [(s.first, s.last) for s in plan_stages(stages, 2, 50, 10)] == [(0, 7), (7, 27), (27, 50)]


def test_cosine_starts_and_ends_low_and_peaks_after_the_warm_up():
    optimizer = Optimizer(lr=2.0, warmup=0.25)
    assert optimizer.lr_at(0.0) == pytest.approx(0.02)
    assert optimizer.lr_at(0.125) == pytest.approx(1.0)
    assert optimizer.lr_at(0.25) == pytest.approx(2.0)
    assert optimizer.lr_at(0.625) == pytest.approx(1.0)
    assert optimizer.lr_at(0.999) <= 0.021


def test_the_triangle_is_torch_s_cyclic_lr():
    optimizer = Optimizer("sgd", lr=0.5, cycle="triangular", momentum=0.9, momentum_low=0.8)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    reference = torch.optim.lr_scheduler.CyclicLR(sgd, base_lr=0.5e-3, max_lr=0.5, step_size_up=50)
    for step in range(100):
        assert optimizer.lr_at(step / 100) == pytest.approx(sgd.param_groups[0]["lr"], abs=5.1e-4)
        assert optimizer.momentum_at(step / 100) == pytest.approx(sgd.param_groups[0]["momentum"], abs=1.1e-4)
        sgd.step()
        reference.step()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage([[0], [2]], share=1)], "blocks 1 to 3 once each"),
        ([Stage([[0, 1, 2]], share=1), Stage([[0], [1, 2]], share=1)], "splits a group"),
        ([Stage([[0, 1, 2]], steps=500)], "take 500 steps, but the run has 100"),
        ([Stage([[0, 1, 2]], steps=50)], "take 50 steps, but the run has 100"),
        ([Stage([[0, 1, 2]], share=1), Stage([[0, 1, 2]], share=1e-9)], "gets no step"),
    ],
)
def test_impossible_plans_are_refused(stages, message):
    with pytest.raises(ConfigError, match=message):
        plan_stages(stages, 3, 100, 10)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="exactly one of share, epochs, steps"):
        Stage([[0]], share=1.0, steps=3)
    with pytest.raises(ConfigError, match="exactly one of share, epochs, steps"):
        Stage([[0]])
    with pytest.raises(ConfigError, match=r"optimizer.lr=-1"):
        Optimizer(lr=-1)
    for clip in (0, -0.5):
        with pytest.raises(ConfigError, match=f"optimizer.clip={clip} was given; it must be greater than 0"):
            Optimizer(clip=clip)
    with pytest.raises(ConfigError, match="method 'hinton'.*kd"):
        method_stages("hinton", 4)
    with pytest.raises(ConfigError, match="recipe 'x'"):
        method_stages("kd", 4, "x")
