"""What a teacher's digest depends on: what it computes, and not how its source is written down."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.cache.fingerprint import prefix_digests

SOURCE = """
import torch
from torch import nn

class Part(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3 if width == 4 else 4, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x)) * {factor}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Part(4), Part(5)

    def forward(self, x):
        return self.two(self.one(x)).mean((2, 3))
"""

REFORMATTED = '''
import torch
from torch import nn


class Part(nn.Module):
    """A convolution and its activation."""

    def __init__(
        self,
        width,  # of the output
    ):
        """Random weights."""
        super().__init__()
        self.conv = nn.Conv2d(
            3 if width == 4 else 4,
            width,
            3,
            padding=1,
        )

    def forward(self, x):
        # in place would be faster
        return (torch.relu(self.conv(x)) * {factor})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Part(4), Part(5)

    def forward(self, x):
        return self.two(self.one(x)).mean((2, 3))
'''


@pytest.fixture
def digests_of(tmp_path, monkeypatch):
    """Digests of a network with the same weights whatever the source, from a module file with that source."""

    def digests(name: str, source: str, factor: str = "2.0") -> list[str]:
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace("{factor}", factor))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        net, images = module.Net().eval(), torch.randn(2, 3, 8, 8)
        pair = net, copy.deepcopy(net)
        lists = [[one.one, _Rest(one)] for one in pair]
        return prefix_digests(pair_blocks(*pair, images, teacher_blocks=lists[0], student_blocks=lists[1]))

    return digests


class _Rest(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.two = net.two

    def forward(self, x):
        return self.two(x).mean((2, 3))


def test_a_reformatted_source_has_the_same_digest(digests_of):
    assert digests_of("plain", SOURCE) == digests_of("formatted", REFORMATTED)


def test_another_computation_has_another_digest(digests_of):
    """Weights and module settings are the same: only the source tells the two apart."""
    before, after = (digests_of(f"times{factor}", SOURCE, factor) for factor in ("2", "3"))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_rows_of_a_folded_teacher_are_those_of_another():
    from stablekd_fast import models
    from stablekd_fast.blocks import serve
    from stablekd_fast.cache.fingerprint import teacher_fingerprint
    from stablekd_fast.data import TrainSource, open_dataset

    data, images = open_dataset("digits", image_size=16), torch.randn(4, 3, 16, 16)
    source = TrainSource(data.train, data.augmentation, data.mean, data.std, batch_size=8, seed=0, views=1)
    paired = pair_blocks(*(models.build("resnet20", 10, 16) for _ in range(2)), images)
    nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
    plain, off, on = (
        teacher_fingerprint(pair, source, torch.device("cpu"))
        for pair in (paired, serve(paired, images, "off"), serve(paired, images, "on"))
    )
    assert plain == off and all(one != other for one, other in zip(plain, on, strict=True))
