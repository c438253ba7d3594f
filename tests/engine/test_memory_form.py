"""A form of memory in which torch's own backward is not safe."""

import copy
import subprocess
import sys
import textwrap

import torch
from torch import nn

from stablekd_fast.execution.memory import placed

STRIDED = """
import torch
from torch import nn
from stablekd_fast.execution.memory import placed

torch.set_num_threads(1)
cpu = torch.device("cpu")
model = placed(placed(nn.Sequential(nn.Conv2d(3, 64, 1, 2, bias=False), nn.BatchNorm2d(64)), cpu), cpu)
assert len(model[0]._forward_pre_hooks) == 1
for _ in range(12):
    images = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    model(images).square().mean().backward()
    beside = [torch.randn(100 * (count % 17 + 1)) for count in range(50)]
"""


def test_a_strided_pointwise_stem_trains():
    """In a process of its own: without care it writes beyond its memory, and ends by a signal."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRIDED)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


def test_other_convolutions_are_channels_last_and_results_stay():
    model = nn.Sequential(nn.Conv2d(3, 16, 1, 2), nn.Conv2d(16, 16, 1, 2), nn.Conv2d(16, 8, 3))
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, 32, 32)
    placed(model, torch.device("cpu"))
    assert [len(layer._forward_pre_hooks) for layer in model] == [1, 0, 0]
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), plain(images))
