"""Steps of the shipped models replay to the bits of eager steps, whatever they are trained with.

Ordinarily with a sample in which every two settings meet; all of them with `pytest -m slow`.
"""

import itertools
from functools import cache

import pytest
import torch
from torchvision.models import ConvNeXt, ResNet, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

from stablekd_fast import models
from stablekd_fast.bench.operators.covering import covering_levels, level_pairs
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.engine.schedule import Optimizer, method_stages
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import Objectives, objective

CLASSES, IMAGES, STEPS = 7, 4, 3
"""Classes of the networks, images in a batch, steps of each stage."""
SIZE = 16
"""Pixels; ResNets of torchvision get twice as many, since at 16 their last stage would have a 3x3 convolution with
stride
2 over a single pixel: of the weights that meet padding only, torch 2.14 on a CPU leaves the bf16 gradient undefined."""


def resnet(blocks):
    return ResNet(Bottleneck, [blocks, 1, 1, 1], num_classes=CLASSES, width_per_group=8)


def vit(layers):
    """A new one's classifier is zero: teacher and student would agree from the start."""
    network = VisionTransformer(SIZE, 8, layers, 2, 32, 64, num_classes=CLASSES)
    torch.nn.init.normal_(network.heads.head.weight, std=0.1)
    return network


def swin(layers):
    return SwinTransformer([2, 2], 16, [layers, layers], [1, 2], [2, 2], stochastic_depth_prob=0.2, num_classes=CLASSES)


def convnext(layers):
    stages = [CNBlockConfig(16, 32, layers), CNBlockConfig(32, None, layers)]
    return ConvNeXt(stages, stochastic_depth_prob=0.2, num_classes=CLASSES)


PAIRS = {
    "resnet20_half": ("resnet20", "resnet20_half"),
    "resnet8x4": ("resnet8x4", "resnet8x4"),
    "wrn": ("wrn_16_2", "wrn_16_1"),
    "vgg": ("vgg11", "vgg8"),
    "shufflenet_v2": ("resnet8x4", "shufflenet_v2"),
    "mobilenet_v2": ("resnet8x4", "mobilenet_v2"),
    "torchvision resnet": (lambda: resnet(2), lambda: resnet(1)),
    "torchvision vit": (lambda: vit(4), lambda: vit(2)),
    "torchvision swin": (lambda: swin(2), lambda: swin(1)),
    "torchvision convnext": (lambda: convnext(2), lambda: convnext(1)),
}
"""The last ones are torchvision's classes with few and narrow layers."""
NORMALIZE = ("power", "channel", "l2", None)
HEADS = {
    "teacher and labels": ({}, {}),
    "teacher alone": ({"temperature": 2.0}, {"use_labels": False}),
    "smoothed labels": ({"temperature": 1.0, "kl_weight": 0.5, "label_smoothing": 0.1}, {}),
    "labels alone": ({}, {"use_teacher_logits": False}),
}
CYCLED = {"cycle": "triangular", "momentum_low": 0.7, "weight_decay": 5e-4}
OPTIMIZERS = {
    "adamw": Optimizer("adamw", lr=0.004),
    "adamw clipped, weights only": Optimizer("adamw", lr=0.004, clip=0.5, decay="weights"),
    "sgd cycled": Optimizer("sgd", lr=0.02, **CYCLED),
    "sgd nesterov clipped": Optimizer("sgd", lr=0.02, nesterov=True, clip=1.0, **CYCLED),
}
SCHEDULES = {
    "default": ("stablekd", "default"),
    "progressive": ("stablekd", "progressive"),
    "paper": ("stablekd", "paper"),
    "paper-end-to-end": ("stablekd", "paper-end-to-end"),
    "blocks": ("blocks", "default"),
    "kd": ("kd", "default"),
}
PRECISIONS = ("fp32", "bf16", "fp16")
ALIGN = ("ends", "all")
EMA = (None, 0.9)
WIDE = ("resnet8x4", "vgg", "shufflenet_v2", "torchvision resnet")
FACTORS = (PAIRS, NORMALIZE, HEADS, OPTIMIZERS, SCHEDULES, PRECISIONS, ALIGN, EMA)


def size_of(name):
    return 2 * SIZE if name == "torchvision resnet" else SIZE


@cache
def prepared(name, settled):
    """The pair as it begins, and the student's first weights and buffers."""
    torch.manual_seed(0)
    size = size_of(name)
    teacher, student = (model() if callable(model) else models.build(model, CLASSES, size) for model in PAIRS[name])
    paired = pair_blocks(settled(teacher, size), student, torch.randn(8, 3, size, size))
    return paired, {key: value.clone() for key, value in student.state_dict().items()}


def stages_of(schedule, blocks, optimizer):
    """Some steps each; at the second merge moments are carried on, at the first they are not."""
    method, recipe = SCHEDULES[schedule]
    stages = method_stages(method, blocks, recipe, OPTIMIZERS[optimizer])
    for number, stage in enumerate(stages):
        stage.share, stage.steps, stage.optimizer_state = None, STEPS, "carry" if number == 2 else "reset"
    return stages


@pytest.fixture
def check(train_stages, same_bits, random_batch, settled):
    """Train eagerly and by replays from the same start; compare all that was kept."""

    def run(name, normalize, head, optimizer, schedule, precision, align, ema):
        paired, first = prepared(name, settled)
        paired.precision = Precision(precision)
        batches = [random_batch(seed, IMAGES, size_of(name), CLASSES) for seed in range(5)]
        options, takes = HEADS[head]
        feature = objective("feature", "mse", {"normalize": normalize})
        aims = Objectives(feature, objective("logits", "kd", options), align, **takes)
        stages, seen = stages_of(schedule, len(paired), optimizer), []
        for mode in ("eager", "emulate"):
            paired.student.load_state_dict(first)
            seen.append(train_stages(mode, paired, aims, stages, batches, ema, loss_scale=64.0))
            trained = paired.student.state_dict()
            moved = [key for key, _ in paired.student.named_parameters() if not torch.equal(first[key], trained[key])]
            assert len(moved) > len(list(paired.student.parameters())) / 2, "hardly anything was trained"
        assert same_bits(*seen)

    return run


def cost(levels):
    return len(stages_of(levels[3], 4, "adamw"))


def with_networks(settings):
    """Give each combination of settings a network, in turn. Float16 convolutions take long on a CPU, so wide networks
    are not given to those in float16."""
    waiting, found = list(PAIRS), []
    for levels in settings:
        name = next(name for name in waiting if name not in WIDE or levels[4] != "fp16")
        waiting.remove(name)
        waiting = waiting if len(waiting) > len(WIDE) else [*waiting, *(one for one in PAIRS if one not in waiting)]
        found.append((name, *levels))
    return found


def words(levels):
    return ", ".join(map(str, levels))


SAMPLE = with_networks(covering_levels(*FACTORS[1:], price=cost))


@pytest.mark.parametrize("levels", SAMPLE, ids=words)
def test_every_two_settings_together_replay_to_the_bits_of_eager_steps(check, levels):
    check(*levels)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PAIRS)
def test_all_combinations_replay_to_the_bits_of_eager_steps(check, name, schedule, precision):
    for normalize, head, optimizer, align, ema in itertools.product(NORMALIZE, HEADS, OPTIMIZERS, ALIGN, EMA):
        check(name, normalize, head, optimizer, schedule, precision, align, ema)


def test_the_sample_holds_all_pairs_of_settings_and_all_networks():
    met = {pair for levels in SAMPLE for pair in level_pairs(levels)}
    for (one, levels), (other, more) in itertools.combinations(list(enumerate(FACTORS))[1:], 2):
        assert {((one, a), (other, b)) for a in levels for b in more} <= met
    assert {levels[0] for levels in SAMPLE} == set(PAIRS)
