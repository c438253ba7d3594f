import dataclasses

import pytest
import torch

from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.errors import CutError
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay


def objectives(align="all", **switches):
    return Objectives(objective("feature", "mse"), objective("logits", "kd"), align, **switches)


def load(inputs, paired, groups, aims, batch):
    load_batch(inputs, Relay(paired), aims.teacher_outputs(groups, len(paired.cuts)), batch)


@pytest.fixture
def parts(make):
    distiller = make()
    batch = next(iter(distiller.source.batches(0, 1)))
    return distiller.paired, batch


def test_a_decomposed_group_trains_its_own_blocks_only(parts):
    paired, batch = parts
    groups = [[0], [1], [2], [3]]
    for group in groups:
        before = {name: value.clone() for name, value in paired.student.named_parameters()}
        inputs = StageInputs()
        load(inputs, paired, groups, objectives(), batch)
        step = GroupStep(paired, group, objectives(), Optimizer(), inputs, rates=Rates.constant(0.01))
        step.run()
        changed = {name for name, value in paired.student.named_parameters() if not torch.equal(value, before[name])}
        assert changed == set(step.parameters)
        assert changed


def test_a_block_with_nothing_to_train_is_refused(parts):
    paired, _ = parts
    for parameter in paired.student_blocks[1].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CutError, match="Block 2 of the student has nothing to train"):
        GroupStep(paired, [1], objectives(), Optimizer(), StageInputs(), rates=Rates.constant(0.01))


def test_the_teacher_runs_only_as_far_as_it_is_read(parts):
    paired, batch = parts
    ran = []
    for k, block in enumerate(paired.teacher_blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    load(StageInputs(), paired, [[0], [1, 2, 3]], objectives("ends", use_teacher_logits=False), batch)
    assert ran == [0]
    ran.clear()
    load(StageInputs(), paired, [[0], [1], [2], [3]], objectives(), batch)
    assert ran == [0, 1, 2, 3]


def test_gradients_are_those_of_the_summed_loss(parts):
    """Backward from given gradients equals autograd through the whole loss, in float64."""
    paired, batch = parts
    paired.student.double(), paired.teacher.double()
    for block in paired.student_blocks:
        block.train()
    inputs, aims = StageInputs(), objectives()
    load(inputs, paired, [[0, 1, 2, 3]], aims, dataclasses.replace(batch, images=batch.images.double()))
    step = GroupStep(paired, [0, 1, 2, 3], aims, Optimizer(), inputs, rates=Rates.constant(0.01))
    outputs, gradients, _ = step.forward()
    torch.autograd.backward(outputs, gradients)
    got = {name: parameter.grad.clone() for name, parameter in step.parameters.items()}
    paired.student.zero_grad()

    x, loss = inputs["images"], 0.0
    for k, block in enumerate(paired.student_blocks):
        x = block(x)
        if k < 3:
            target = inputs[f"teacher{k}"]
            loss = loss + (x - target).pow(2).mean() / target.pow(2).mean()
    teacher = torch.softmax(inputs["teacher3"] / 4, 1)
    kl = (teacher * (teacher.log() - torch.log_softmax(x / 4, 1))).sum(1).mean() * 16
    (loss + 0.1 * kl + torch.nn.functional.cross_entropy(x, inputs["labels"])).backward()
    for name, parameter in step.parameters.items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_rates_follow_the_stage(parts):
    paired, batch = parts
    for settings in (Optimizer("sgd", momentum=0.0, weight_decay=0.0), Optimizer("adamw", weight_decay=0.0)):
        inputs = StageInputs()
        load(inputs, paired, [[0]], objectives(), batch)
        rates = Rates(torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]))
        step = GroupStep(paired, [0], objectives(), settings, inputs, rates=rates)
        before = [parameter.clone() for parameter in step.parameters.values()]
        step.run()
        assert all(torch.equal(a, b) for a, b in zip(before, step.parameters.values()))
        step.run()
        assert not all(torch.equal(a, b) for a, b in zip(before, step.parameters.values()))


def test_gradients_added_up_over_parts_of_a_batch_are_those_of_the_batch(parts):
    """In float64, with frozen batch norms: statistics of parts are others."""
    paired, batch = parts
    paired.student.double().eval(), paired.teacher.double()
    for block in paired.student_blocks:
        block.eval()
    aims, groups = objectives(), [[0, 1, 2, 3]]
    start = {name: value.clone() for name, value in paired.student.state_dict().items()}
    trained = []
    for count in (1, 4):
        paired.student.load_state_dict(start)
        inputs = StageInputs()
        load(inputs, paired, groups, aims, dataclasses.replace(batch, images=batch.images.double()))
        step = GroupStep(
            paired, groups[0], aims, Optimizer("sgd"), inputs, rates=Rates.constant(0.1), micro_batches=count
        )
        step.run()
        trained.append(([value.clone() for value in step.parameters.values()], step.losses[0].item()))
    (whole, loss), (added, loss_of_parts) = trained
    assert max((a - b).abs().max() for a, b in zip(whole, added)) < 1e-12
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert any((a - start[name]).abs().max() > 1e-4 for a, name in zip(added, step.parameters))
