import pytest
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks.trace import trace
from stablekd_fast.models.cifar_mobilenet_v2 import InvertedResidual
from stablekd_fast.models.cifar_resnet import BasicBlock, PaddedShortcut
from stablekd_fast.models.cifar_shufflenet_v2 import BasicUnit
from stablekd_fast.models.cifar_wrn import PreActivationBlock

CLASSES_10, CLASSES_100 = 10, 100

# Parameter counts: published where a paper or its code states them, else what the published architecture gives.
# He et al. count with 10 classes, the distillation literature with 100.
PARAMETERS = {
    "resnet20": (CLASSES_10, 269_722),
    "resnet32": (CLASSES_10, 464_154),
    "resnet44": (CLASSES_10, 658_586),
    "resnet56": (CLASSES_10, 853_018),
    "resnet110": (CLASSES_10, 1_727_962),
    "resnet20_half": (CLASSES_10, 68_050),
    "resnet8x4": (CLASSES_100, 1_233_540),
    "resnet32x4": (CLASSES_100, 7_433_860),
    "wrn_40_2": (CLASSES_100, 2_255_156),
    "wrn_40_1": (CLASSES_100, 569_780),
    "wrn_16_2": (CLASSES_100, 703_284),
    "wrn_16_1": (CLASSES_100, 180_916),
    "vgg8": (CLASSES_100, 3_965_028),
    "vgg11": (CLASSES_100, 9_277_284),
    "vgg13": (CLASSES_100, 9_462_180),
    "vgg16": (CLASSES_100, 14_774_436),
    "vgg19": (CLASSES_100, 20_086_692),
    "resnet8_fc": (CLASSES_100, 83_892),
    "resnet14_fc": (CLASSES_100, 181_108),
    "resnet20_fc": (CLASSES_100, 278_324),
    "resnet56_fc": (CLASSES_100, 861_620),
    "resnet110_fc": (CLASSES_100, 1_736_564),
    "shufflenet_v1": (CLASSES_100, 949_258),
    "shufflenet_v2": (CLASSES_100, 1_355_528),
    "mobilenet_v2": (CLASSES_100, 812_836),
    "resnet18_cifar": (CLASSES_100, 11_220_132),
    "resnet34_cifar": (CLASSES_100, 21_328_292),
    "resnet50_cifar": (CLASSES_100, 23_705_252),
}

RESNET_STAGES = {
    "relu": (32, 32),
    "layer1": (32, 32),
    "layer2": (16, 16),
    "layer3": (8, 8),
    "avgpool": (1, 1),
}
WRN_STAGES = {"block1": (32, 32), "block2": (16, 16), "block3": (8, 8), "relu": (8, 8), "avgpool": (1, 1)}
VGG_STAGES = {
    "block0": (32, 32),
    "block1": (16, 16),
    "block2": (8, 8),
    "block3": (4, 4),
    "block4": (4, 4),
    "pool4": (1, 1),
}
SHUFFLENET_STAGES = {
    "relu1": (32, 32),
    "layer1": (16, 16),
    "layer2": (8, 8),
    "layer3": (4, 4),
    "avgpool": (1, 1),
}
SHUFFLENET_V1_STAGES = {
    "relu": (32, 32),
    "layer1": (16, 16),
    "layer2": (8, 8),
    "layer3": (4, 4),
    "avgpool": (1, 1),
}
MOBILENET_STAGES = {
    "blocks.1": (16, 16),
    "blocks.2": (8, 8),
    "blocks.4": (4, 4),
    "blocks.6": (2, 2),
    "avgpool": (1, 1),
}

# Names by which published weight files know the parts, those that a rewrite would be most likely to change.
KEYS = {
    "resnet20": {
        "conv1.weight",
        "bn1.running_mean",
        "layer2.0.conv1.weight",
        "layer3.2.bn2.bias",
        "linear.weight",
    },
    "resnet8x4": {
        "layer1.0.downsample.0.weight",
        "layer2.0.downsample.1.running_var",
        "layer3.0.conv2.weight",
        "fc.bias",
    },
    "wrn_16_2": {"block1.layer.0.convShortcut.weight", "block2.layer.1.bn1.weight", "bn1.bias", "fc.weight"},
    "vgg8": {"block0.0.bias", "block4.1.running_mean", "classifier.weight"},
    "vgg13": {"block0.3.weight", "block0.4.bias", "classifier.weight"},
    "shufflenet_v2": {"layer1.0.conv5.weight", "layer2.7.bn3.bias", "conv2.weight", "linear.bias"},
    "mobilenet_v2": {
        "conv1.1.bias",
        "blocks.0.0.conv.6.weight",
        "blocks.6.0.conv.7.bias",
        "conv2.0.weight",
        "classifier.0.weight",
    },
}


def stages(name: str) -> dict[str, tuple[int, int]]:
    if name.startswith("resnet"):
        return RESNET_STAGES
    if name.startswith("vgg"):
        return VGG_STAGES
    return {
        "shufflenet_v1": SHUFFLENET_V1_STAGES,
        "shufflenet_v2": SHUFFLENET_STAGES,
        "mobilenet_v2": MOBILENET_STAGES,
    }.get(name, WRN_STAGES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_forward_in_train_and_eval(name):
    model, images = models.build(name, 7), torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        logits = model.train(mode)(images)
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    classes, count = PARAMETERS[name]
    assert sum(parameter.numel() for parameter in models.build(name, classes).parameters()) == count


def test_mobilenet_for_imagenet():
    model = models.build("MobileNetV1", 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_231_976
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("name", PARAMETERS)
def test_stages_are_places_to_cut(name):
    network = trace(models.build(name, 10), torch.randn(2, 3, 32, 32))
    spatial = {alias: point.layout.places for point in network.points for alias in point.aliases}
    expected = stages(name)
    assert {stage: spatial.get(stage) for stage in expected} == expected
    leaves = {node.target for node in network.graph.nodes if node.op == "call_module"}
    assert not [leaf for leaf in leaves if list(network.root.get_submodule(leaf).children())]


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "resnet20_half", "vgg8", "mobilenet_v2"])
def test_digits_of_8x8_pixels_train(name):
    model = models.build(name, 10).train()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_uses_the_published_names(name):
    assert KEYS[name] <= models.build(name, 10).state_dict().keys()


def test_padded_shortcut_subsamples_and_pads_half_on_each_side():
    x = torch.arange(2 * 2 * 4 * 4, dtype=torch.float32).reshape(2, 2, 4, 4)
    out = PaddedShortcut(2, 4, 2)(x)
    assert out.shape == (2, 4, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, [0, 2]][:, :, :, [0, 2]])
    assert out[:, 0].eq(0).all() and out[:, 3].eq(0).all()


def test_padded_shortcuts_have_no_state():
    assert not [key for key in models.build("resnet20", 10).state_dict() if "downsample" in key]


def test_basic_block_adds_its_input_before_the_last_activation():
    block = BasicBlock(4, 4, 1, PaddedShortcut).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.clamp(min=0))


def test_pre_activation_block_projects_its_activated_input_where_the_width_changes():
    x = torch.randn(2, 4, 6, 6)
    keeping, widening = PreActivationBlock(4, 4, 1).eval(), PreActivationBlock(4, 8, 2).eval()
    nn.init.zeros_(keeping.conv2.weight)
    nn.init.zeros_(widening.conv2.weight)
    assert torch.equal(keeping(x), x)
    assert torch.equal(widening(x), widening.convShortcut(widening.bn1(x).clamp(min=0)))


def test_inverted_residual_adds_its_input_where_the_shape_is_kept():
    x = torch.randn(2, 4, 6, 6)
    for width, stride, expected in (
        (4, 1, x),
        (6, 1, torch.zeros(2, 6, 6, 6)),
        (4, 2, torch.zeros(2, 4, 3, 3)),
    ):
        block = InvertedResidual(4, width, stride, 6).eval()
        nn.init.zeros_(block.conv[-1].weight)
        assert torch.equal(block(x), expected)


def test_shuffle_alternates_kept_and_new_channels():
    unit, x = BasicUnit(6).eval(), torch.randn(2, 6, 4, 4)
    out = unit(x)
    assert torch.equal(out[:, 0::2], x[:, :3])
    assert not torch.equal(out[:, 1::2], x[:, 3:])


def test_convolutions_begin_at_the_he_scale():
    torch.manual_seed(0)
    weight = models.build("resnet20", 10).layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)  # 36,864 draws: 0.4% expected


def test_shallow_vision_transformer():
    model = models.build("vit_b_16_6l", 10, image_size=32).eval()
    assert len(model.encoder.layers) == 6
    network = trace(model, torch.randn(2, 3, 32, 32))
    names = {alias for point in network.points for alias in point.aliases}
    assert {f"encoder.layers.encoder_layer_{i}" for i in range(6)} <= names
