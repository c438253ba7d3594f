import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stablekd_fast import models
from stablekd_fast.config import DistillConfig
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.engine.evaluate import with_fresh_batch_norm
from stablekd_fast.engine.schedule import Optimizer, Stage
from stablekd_fast.errors import ConfigError, TrainingError
from stablekd_fast.run import distiller as distiller_module
from stablekd_fast.run.distiller import Distiller


def events(distiller, kind):
    lines = open(f"{distiller.config.out}/events.jsonl").read().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def final_weights(distiller):
    tensors, _ = load_tensors(f"{distiller.config.out}/checkpoint.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("student/")}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("method", ["stablekd", "kd", "kd+features", "blocks", "ce"])
def test_every_method_runs_through_the_same_engine(make, method):
    distiller = make(method=method)
    result = distiller.run(progress=False)
    assert result.steps == 15 and result.epochs == 3.0
    assert 0.0 <= result.accuracy <= 1.0
    stages = [event["groups"] for event in events(distiller, "stage_start")]
    expected = {
        "stablekd": [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]],
        "blocks": [[[0], [1], [2], [3]]],
        "ce": [[[0]]],
    }
    assert stages == expected.get(method, [[[0, 1, 2, 3]]])


def test_two_runs_with_one_seed_give_the_same_bits(make):
    runs = [make(out=name) for name in ("a", "b")]
    for run in runs:
        run.run(progress=False)
    assert_same(*map(final_weights, runs))


def test_evaluating_never_changes_training(make):
    runs = [make(out="often", evaluate_every=0.2), make(out="never", evaluate_every=0, validation=40)]
    for run in runs:
        run.run(progress=False)
    assert len(events(runs[0], "evaluate")) > len(events(runs[1], "evaluate"))
    assert_same(*map(final_weights, runs))


def test_the_composed_student_is_continuous_at_merges(make):
    distiller = make()
    distiller.run(progress=False)
    merges = events(distiller, "merge")
    assert [merge["merge_step"] for merge in merges] == [5, 10]
    assert all(merge["max_output_difference"] == 0.0 for merge in merges)
    assert set(merges[0]["exposure_gap"]) == {"1", "2", "logits"}
    assert all(gap > 0 for gap in merges[0]["exposure_gap"].values())


def test_kd_is_what_a_plain_loop_computes(make):
    """Against Hinton distillation written down in plain PyTorch, float32, the same batches and optimizer."""
    options = {"temperature": 3.0, "kl_weight": 0.5, "ce_weight": 0.7}
    distiller = make(method="kd", epochs=1.0, logits_options=options, copy_classifier=False, validation=0)
    plain, teacher = __import__("copy").deepcopy((distiller.paired.student, distiller.paired.teacher))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.05)
    schedule = Optimizer(lr=0.01)
    plain.train()
    for step, batch in enumerate(distiller.source.batches(0, 5)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step / 5)
        with torch.no_grad():
            target = F.softmax(teacher(batch.images) / 3.0, 1)
        logits = plain(batch.images)
        kl = F.kl_div(F.log_softmax(logits / 3.0, 1), target, reduction="batchmean") * 9.0
        loss = 0.5 * kl + 0.7 * F.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    distiller.run(progress=False)
    for mine, theirs in zip(distiller.paired.student.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_optimizer_state_is_carried_or_reset_at_a_merge(make):
    def stages(state):
        return [
            Stage([[0], [1], [2], [3]], share=1.0, optimizer=Optimizer(lr=0.01)),
            Stage([[0, 1], [2, 3]], share=1.0, optimizer=Optimizer(lr=0.01), optimizer_state=state),
        ]

    runs = {state: make(out=state, stages=stages(state), epochs=2.0) for state in ("carry", "reset")}
    counts = {}
    for state, run in runs.items():
        run.run(progress=False)
        tensors, _ = load_tensors(f"{run.config.out}/checkpoint.safetensors")
        counts[state] = {value.item() for name, value in tensors.items() if name.endswith("/step")}
    assert counts == {"carry": {10.0}, "reset": {5.0}}


def test_batch_norm_is_re_estimated_on_a_copy(make):
    distiller = make()
    student = distiller.paired.student
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    batches = list(distiller.source.batches(0, 2))
    fresh = with_fresh_batch_norm(student, batches, lambda tensor: tensor)
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, before[name])
    inputs = [student[0][0](batch.images).double() for batch in batches]
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(fresh[0][1].running_mean.double(), expected, rtol=1e-4, atol=1e-5)
    assert not fresh.training and fresh[0][1].momentum == student[0][1].momentum


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(make):
    """The learning rate climbs until blocks diverge; the checkpoint before that stays and is finite."""
    distiller = make(optimizer=Optimizer("sgd", lr=1e9, warmup=1.0), checkpoint_every=1, log_every=1)
    with pytest.raises(
        TrainingError, match=r"blocks \d (is|are) not finite at step \d+ \(stage 1\|2\|3\|4\).*learning"
    ):
        distiller.run(progress=False)
    assert all(value.isfinite().all() for value in final_weights(distiller).values() if value.is_floating_point())


def test_a_broken_update_is_never_saved(make):
    distiller = make(optimizer=Optimizer("sgd", lr=1e38, cycle="constant"), checkpoint_every=1, log_every=1)
    with pytest.raises(TrainingError, match="not finite at step 0"):
        distiller.run(progress=False)
    _, metadata = load_tensors(f"{distiller.config.out}/checkpoint.safetensors")
    assert metadata["progress"]["step"] == 0
    assert all(value.isfinite().all() for value in final_weights(distiller).values())


def test_what_the_very_last_update_breaks_is_not_exported(make):
    """No loss shows it any more."""
    broken = Optimizer("sgd", lr=1e38, cycle="constant")
    distiller = make(optimizer=broken, method="blocks", epochs=0.2, validation=0, log_every=1)
    assert distiller.decided.stages[-1].last == 1
    with pytest.raises(TrainingError, match=r"weights of blocks \d are not finite at step 0"):
        distiller.run(progress=False)
    assert not (Path(distiller.config.out) / "student.safetensors").exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_running_statistics_that_are_not_finite_are_not_saved(make, value):
    distiller = make()
    name, buffer = next((n, b) for n, b in distiller.paired.student.named_buffers() if n.endswith("running_var"))
    buffer[1] = value
    with pytest.raises(TrainingError, match=rf"student's {name} is not finite"):
        distiller.run(progress=False)
    assert not (Path(distiller.config.out) / "checkpoint.safetensors").exists()


class OverflowsInEvaluation(torch.nn.Module):
    """Logits that training sees, and that are too large once it is over."""

    def __init__(self):
        super().__init__()
        self.net = models.build("resnet20_half", 10, 8)

    def forward(self, images):
        logits = self.net(images)
        return logits if self.training else logits * 1e38 * 1e38


@pytest.mark.parametrize(
    "validation, what", [(40, "loss on held-out images is"), (0, "logits of the composed student")]
)
def test_logits_that_overflow_in_evaluation_are_not_exported(make, validation, what):
    distiller = make(method="ce", cuts=None, validation=validation)
    distiller.given = dataclasses.replace(distiller.given, student=OverflowsInEvaluation(), teacher=None)
    with pytest.raises(TrainingError, match=f"{what}.* not finite"):
        distiller.run(progress=False)
    assert not (Path(distiller.config.out) / "student.safetensors").exists()


def test_inputs_of_another_shape_are_refused(make):
    from stablekd_fast.engine.inputs import StageInputs

    inputs = StageInputs()
    inputs.load("images", torch.zeros(4, 3, 8, 8))
    with pytest.raises(TrainingError, match=r"expected \[4, 3, 8, 8\].*got \[3, 3, 8, 8\]"):
        inputs.load("images", torch.zeros(3, 3, 8, 8))
    held = torch.ones(4, 3, 8, 8)
    inputs.load("images", held)
    held.zero_()
    assert inputs["images"].eq(1).all(), "the caller's tensor was adopted"


def test_the_head_is_copied_to_a_student_by_name_only(make, digits, tmp_path):
    """A module that is given is the user's, with the head that it has."""

    def heads(distiller):
        return [network.fc.weight for network in (distiller.paired.student, distiller.paired.teacher)]

    for copied in (True, False):
        config = DistillConfig(
            student="resnet8x4", out=str(tmp_path / str(copied)), copy_classifier=copied, subset=64, batch_size=32
        )
        assert torch.equal(*heads(Distiller(config, teacher=models.build("resnet8x4", 10), dataset=digits))) == copied
    distiller = make(copy_classifier=True)
    assert not torch.equal(distiller.paired.student[-1].weight, distiller.paired.teacher[-1].weight)


def test_distilling_modules_from_python(small_net, digits, tmp_path):
    import stablekd_fast

    settings = {"epochs": 1, "subset": 96, "batch_size": 32, "validation": 0, "cuts": ["0", "1", "2"]}
    student = small_net(1, 2)
    before = student[0][0].weight.clone()
    result = stablekd_fast.distill(
        teacher=small_net(2, 1), student=student, dataset=digits, out=str(tmp_path / "run"), progress=False, **settings
    )
    assert result.steps == 3
    assert not torch.equal(student[0][0].weight, before), "the student that was given is the one that is trained"
    with pytest.raises(ConfigError, match="no setting 'epohcs'; the nearest is 'epochs'"):
        stablekd_fast.distill(epohcs=1)


def test_block_lists_made_by_hand_are_trained(small_net, digits, tmp_path):
    """For models that cannot be traced: the same numbers as with the cuts that are found."""
    from stablekd_fast import DistillConfig, Distiller, pair_blocks

    settings = {
        "epochs": 2,
        "subset": 96,
        "batch_size": 32,
        "validation": 0,
        "device": "cpu",
        "precision": "fp32",
        "fuse_norms": "off",
    }
    runs = []
    for by_hand in (True, False):
        teacher, student = small_net(2, 1).eval(), small_net(1, 2)
        config = DistillConfig(**settings, cuts=["0", "1"], out=str(tmp_path / str(by_hand)))
        if by_hand:
            lists = [[net[0], net[1], net[2:]] for net in (teacher, student)]
            images = torch.zeros(2, 3, 8, 8)
            paired = pair_blocks(teacher, student, images, teacher_blocks=lists[0], student_blocks=lists[1])
            runs.append(Distiller(config, dataset=digits, paired=paired))
        else:
            runs.append(Distiller(config, dataset=digits, teacher=teacher, student=student, paired=None))
        runs[-1].run(progress=False)
    assert runs[0].paired.cuts[0].name == "block0"
    assert_same(*map(final_weights, runs))


def test_distilled_students_learn(make):
    """Loss of every decomposed block falls, and the composed student ends well above chance."""
    distiller = make(method="ce", epochs=8.0, subset=None, validation=0)
    result = distiller.run(progress=False)
    assert result.accuracy > 0.8
    assert isinstance(distiller.paired.student, nn.Sequential)


def test_a_run_that_does_not_fit_leaves_nothing_behind(make, monkeypatch):
    """All is decided before a file is written, and decided once."""
    decided = []

    def counting(materials, decide=distiller_module.decide):
        decided.append(materials)
        return decide(materials)

    monkeypatch.setattr(distiller_module, "decide", counting)
    distiller = make(stages=[Stage([[0]], share=1.0)])
    with pytest.raises(ConfigError, match="must hold the blocks"):
        distiller.run(progress=False)
    assert not Path(distiller.config.out).exists() and len(decided) == 1
