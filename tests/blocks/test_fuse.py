"""Blocks with fused norms compute what the network's own blocks compute."""

import copy
import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from stablekd_fast import models
from stablekd_fast.blocks import fuse_norms, pair_blocks, pick_fusion
from stablekd_fast.blocks.fuse import NormAct
from stablekd_fast.errors import ConfigError

NETWORKS = [
    ("resnet20", 10, 16), ("resnet8x4", 10, 16), ("wrn_16_2", 10, 16), ("vgg8", 10, 32), ("shufflenet_v2", 10, 32),
    ("mobilenet_v2", 10, 32), ("torchvision/resnet18", 10, 64), ("torchvision/resnet50", 10, 64),
    ("torchvision/convnext_tiny", 10, 64), ("torchvision/efficientnet_b0", 10, 64),
]  # fmt: skip


def blocks_of(name, classes, size, dtype):
    torch.manual_seed(0)
    network = models.build(name, classes, size).to(memory_format=torch.channels_last)
    paired = pair_blocks(copy.deepcopy(network), network, torch.randn(2, 3, size, size))
    network.to(dtype)
    return network, paired.student_blocks


def run(blocks, images, mode):
    """Outputs of all blocks, then gradients of all parameters, by one backward pass."""
    x, outputs = images, []
    for block in blocks:
        block.train(mode)
        x = block(x)
        outputs.append(x)
    parameters = [p for block in blocks for p in block.parameters()]
    torch.manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs)
    return outputs, torch.autograd.grad(loss, parameters, allow_unused=True)


def buffers(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


@pytest.mark.parametrize("name, classes, size", NETWORKS)
def test_fused_blocks_compute_what_the_network_computes(name, classes, size):
    """In float64, where only the order of operations differs; outputs, gradients, and running statistics."""
    network, blocks = blocks_of(name, classes, size, torch.float64)
    images = torch.randn(4, 3, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    before = buffers(network)
    results = []
    for these in (blocks, [fuse_norms(block) for block in blocks]):
        network.load_state_dict(before, strict=False)
        torch.manual_seed(2)  # of dropout and stochastic depth
        outputs, gradients = run(these, images, True)
        names = {id(p): name for name, p in network.named_parameters()}
        named = {names[id(p)]: g for p, g in zip((p for block in these for p in block.parameters()), gradients)}
        results.append((outputs, named, buffers(network)))
    (outputs, gradients, statistics), (fused_outputs, fused_gradients, fused_statistics) = results
    for one, other in zip(outputs, fused_outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == fused_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():  # that of a bias before a norm is zero but for roundings
        torch.testing.assert_close(gradient, fused_gradients[parameter], rtol=1e-7, atol=1e-12 * largest)
    for buffer, value in statistics.items():
        torch.testing.assert_close(value, fused_statistics[buffer], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, classes, size", NETWORKS)
def test_in_evaluation_fused_blocks_give_the_network_s_bits(name, classes, size):
    network, blocks = blocks_of(name, classes, size, torch.float32)
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    network.eval()
    fused = [fuse_norms(block).eval() for block in blocks]
    x = images
    with torch.no_grad():
        for block in fused:
            x = block(x)
        assert torch.equal(x, network(images))


def test_every_norm_of_a_residual_network_is_fused_with_what_follows_it():
    _, blocks = blocks_of("torchvision/resnet18", 10, 64, torch.float32)
    fused = [fuse_norms(block) for block in blocks]
    nodes = [(block, node) for block in fused for node in block.graph.nodes if node.op == "call_module"]
    norms = [(block.get_submodule(node.target), node) for block, node in nodes]
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.ReLU)) for module, _ in norms)
    joined = [(module, node) for module, node in norms if isinstance(module, NormAct)]
    assert len(joined) == 20
    assert sum(module.relu for module, _ in joined) == 17, "three norms of shortcuts have no ReLU of their own"
    assert sum(len(node.args) == 2 for _, node in joined) == 8, "two residual additions in each of four stages"
    assert not any(node.target in (operator.add, operator.iadd) for block in fused for node in block.graph.nodes)
    ours = {id(p) for block in fused for p in block.parameters()}
    assert ours == {id(p) for block in blocks for p in block.parameters()}


class Odd(nn.Module):
    """Places where joining would change what is computed."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        if kind == "cumulative average":
            self.norm = nn.BatchNorm2d(4, momentum=None)
        if kind == "without weights":
            self.norm = nn.BatchNorm2d(4, affine=False)
        if kind == "hooked":
            self.norm.register_forward_hook(lambda module, arguments, output: output * 2)
        if kind == "without statistics":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        out = self.conv(x)
        if self.kind == "added in place to the residual":
            kept = x * 1
            kept += self.norm(out)
            return F.relu(kept) + kept
        if self.kind == "used twice":
            out = self.norm(out)
            return F.relu(out) + out
        if self.kind == "added to itself":
            out = self.norm(out)
            return F.relu(out + out)
        if self.kind == "added with a factor":
            return F.relu(torch.add(self.norm(out), x, alpha=2))
        if self.kind == "added to a number":
            return F.relu(self.norm(out) + 1)
        if self.kind == "broadcast":
            return F.relu(self.norm(out) + out.mean((2, 3), keepdim=True))
        return F.relu(self.norm(out))


@pytest.mark.parametrize(
    "kind",
    ["added in place to the residual", "used twice", "added to itself", "added with a factor", "added to a number",
     "broadcast", "cumulative average", "without weights", "hooked", "without statistics"],
)  # fmt: skip
def test_what_cannot_be_joined_computes_as_before(kind):
    torch.manual_seed(0)
    module = Odd(kind).double()
    traced = fx.symbolic_trace(module)
    images = torch.randn(3, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module(images)
    module.load_state_dict(state)
    torch.testing.assert_close(fuse_norms(traced)(images), expected, rtol=1e-10, atol=1e-10)


def test_other_layouts_and_blocks_made_by_hand_go_the_network_s_way():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert fuse_norms(block) is block
    traced, images = fx.symbolic_trace(block), torch.randn(2, 3, 6, 6)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    expected = block(images)
    block.load_state_dict(state)
    assert torch.equal(fuse_norms(traced)(images), expected)


def test_fusion_is_picked_by_device_and_what_is_built():
    from stablekd_fast.kernels import _native, _triton

    assert pick_fusion("auto", torch.device("cpu")) == (_native.core is not None)
    assert not pick_fusion("off", torch.device("cpu"))
    assert pick_fusion("auto", torch.device("cuda")) == (_triton.missing is None)
    assert not pick_fusion("auto", torch.device("meta"))
    with pytest.raises(ConfigError, match="fuse_norms=on was given, but on meta there is no fast kernel for it"):
        pick_fusion("on", torch.device("meta"))
    with pytest.raises(ConfigError, match="choose one of auto, on, off"):
        pick_fusion("yes", torch.device("cpu"))
