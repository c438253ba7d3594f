"""Every pair that is to work out of the box: it cuts, composes, trains block by block, and exports."""

import pytest
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer, merge_neighbours
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay

PAIRS = [
    ("resnet56", "resnet20", 32, 4),
    ("resnet32x4", "resnet8x4", 32, 4),
    ("wrn_40_2", "wrn_16_2", 32, 4),
    ("vgg13", "vgg8", 32, 4),
    ("resnet32x4", "shufflenet_v2", 32, 3),
    ("resnet32x4", "mobilenet_v2", 32, 3),
    ("resnet56", "resnet20_half", 32, 4),
    ("torchvision/resnet34", "torchvision/resnet18", 64, 5),
    ("torchvision/resnet50", "torchvision/mobilenet_v3_large", 64, 5),
    ("torchvision/convnext_small", "torchvision/convnext_tiny", 64, 5),
    ("torchvision/vit_b_16", "vit_b_16_6l", 32, 4),
    ("torchvision/swin_b", "torchvision/swin_t", 64, 5),
    ("torchvision/efficientnet_b3", "torchvision/efficientnet_b0", 64, 5),
]
CLASSES = 7


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torchvision/", ""))
def pair(request):
    """Teacher, student, images and blocks, prepared once per pair and trained by the tests in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    teacher_name, student_name, size, count = request.param
    torch.manual_seed(0)
    images = torch.randn(4, 3, size, size)
    teacher = models.build(teacher_name, CLASSES, size).eval()
    student = models.build(student_name, CLASSES, size)
    yield student_name, count, pair_blocks(teacher, student, images), images
    torch.set_num_threads(threads)


def composed(paired, images):
    x = images
    for block in paired.student_blocks:
        x = block(x)
    return x


def set_mode(paired, training: bool) -> None:
    nn.ModuleList([paired.student, *paired.student_blocks]).train(training)


def test_it_is_cut_into_blocks_that_each_do_something(pair):
    _, count, paired, _ = pair
    assert len(paired) == count
    assert all(any(True for _ in block.parameters()) for block in paired.student_blocks)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_composed_blocks_are_the_plain_model(pair, training):
    """In train mode too: same batch statistics, same random numbers for dropout and stochastic depth."""
    _, _, paired, images = pair
    set_mode(paired, training)
    state = {name: value.clone() for name, value in paired.student.state_dict().items()}
    with torch.no_grad():
        torch.manual_seed(3)
        plain = paired.student(images)
        after_plain = {name: value.clone() for name, value in paired.student.named_buffers()}
        paired.student.load_state_dict(state)
        torch.manual_seed(3)
        ours = composed(paired, images)
    assert torch.equal(plain, ours)
    assert all(torch.equal(value, after_plain[name]) for name, value in paired.student.named_buffers())
    paired.student.load_state_dict(state)


def load(inputs, paired, groups, aims, images):
    batch = Batch(torch.arange(4), 0, images, torch.arange(4) % CLASSES)
    load_batch(inputs, Relay(paired), aims.teacher_outputs(groups, len(paired.cuts)), batch)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_a_decomposed_block_touch_that_block_only(pair, training):
    _, count, paired, images = pair
    set_mode(paired, training)
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    groups = [[k] for k in range(count)]
    inputs = StageInputs()
    load(inputs, paired, groups, aims, images)
    for group in groups:
        step = GroupStep(paired, group, aims, Optimizer(), inputs, rates=Rates.constant(0.01))
        paired.student.zero_grad()
        outputs, gradients, _ = step.forward()
        torch.autograd.backward(outputs, gradients)
        touched = {name for name, p in paired.student.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched and touched <= set(step.parameters)
    paired.student.zero_grad()
    assert all(p.grad is None for p in paired.teacher.parameters())


def test_a_few_steps_through_all_merges_and_the_export_loads(pair, tmp_path):
    name, count, paired, images = pair
    set_mode(paired, True)
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    for groups in merge_neighbours(count):
        inputs = StageInputs()
        load(inputs, paired, groups, aims, images)
        for group in groups:
            step = GroupStep(paired, group, aims, Optimizer(lr=1e-3), inputs, rates=Rates.constant(1e-3))
            step.run()
            assert torch.isfinite(step.losses).all()
    from safetensors.torch import save_file

    set_mode(paired, False)
    save_file({k: v.contiguous() for k, v in paired.student.state_dict().items()}, tmp_path / "student.safetensors")
    fresh = models.build(name, CLASSES, images.shape[-1]).eval()
    models.load_weights(fresh, tmp_path / "student.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(images), paired.student(images))
