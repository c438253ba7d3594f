"""Networks whose Python decides on sizes, and what it may not decide on."""

import copy
import math

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.blocks.trace import trace
from stablekd_fast.errors import CutError, ModelError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Stages of which the middle is a subclass's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.middle(self.one(x)).mean((2, 3)))

    def middle(self, x):
        return self.two(x)


class Asserts(Net):
    def middle(self, x):
        _, channels, rows, columns = x.shape
        assert channels == 8, f"{channels} channels"
        if rows != columns or x.dim() != 4:
            raise ValueError
        return self.two(x)


class Pads(Net):
    """As windowed attention does where windows do not fill the map."""

    def middle(self, x):
        missing = (5 - x.shape[-1] % 5) % 5
        if missing > 0:
            x = nn.functional.pad(x, (0, missing, 0, missing))
        return self.two(x)


class WholeNumbers(Net):
    def middle(self, x):
        rows = int(x.shape[2] / 2)
        side = math.ceil(float(x.size(3)) / 3)
        x = nn.functional.interpolate(x, (rows, max(rows, side)))
        return self.two(x)


class Lengths(Net):
    """The length of a batch is open, that of a shape is not."""

    def middle(self, x):
        bias = torch.ones(1, 8, 1, 1).expand(len(x), -1, -1, -1)
        more = torch.zeros(x.shape[0], 8, 1, 1, device=x.device)
        place = torch.arange(x.shape[-1], dtype=x.dtype)
        return self.two(x + bias + more + place) if len(x.shape) == 4 else None


class Starred(Net):
    """As the attention of Hugging Face's models."""

    def middle(self, x):
        x = x.movedim(1, -1)
        shape = (*x.shape[:-1], 2, -1)
        return self.two(x.view(shape).flatten(-2).movedim(-1, 1))


class Loops(Net):
    def middle(self, x):
        rows = [x[:, :, row] for row in range(x.shape[2])]
        return self.two(torch.stack(rows[::-1], 2))


class Assigns(Net):
    """Writes to a part of a tensor; what was cut off before is not changed."""

    def middle(self, x):
        x = x * 1.0
        x[:, 1] = 0.0
        x[:, 2:4] += 1.0
        x[..., 0] *= 2.0
        return self.two(x)


class AssignsBehindACut(Net):
    def __init__(self):
        super().__init__()
        self.one = self.one[0]

    def middle(self, x):
        x[:, 1] = 0.0
        return self.two(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "kind", [Asserts, Pads, WholeNumbers, Lengths, Starred, Loops, Assigns, AssignsBehindACut], ids=lambda k: k.__name__
)
def test_blocks_do_what_the_network_does_for_any_number_of_images(kind, training):
    model = kind()
    paired = pair_blocks(copy.deepcopy(model).eval(), model, IMAGES, ["one"])
    nn.ModuleList([model, *paired.student_blocks]).train(training)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 16, 16)
        kept = images.clone()
        first = paired.student_blocks[0](images)
        before = first.clone()
        output = paired.student_blocks[1](first)
        assert torch.equal(output, model(images))
        assert torch.equal(first, before) and torch.equal(images, kept)


class Rotary(nn.Module):
    """Positions made anew in each pass, as DINOv3's and EVA's, of the buffer's type and where it is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("periods", torch.tensor([1.0, 2.0, 4.0, 8.0]))
        self.part = nn.Identity()

    def forward(self, columns):
        places = torch.arange(columns).to(device=self.periods.device, dtype=self.periods.dtype)
        angles = places[:, None] / self.periods
        return torch.cat([angles.sin(), angles.cos()], -1).chunk(2, -1)


class Beside(Net):
    """What is made beside the main path, of sizes, devices and buffers alone, hides no cut."""

    def __init__(self):
        super().__init__()
        self.rotary = Rotary()

    def middle(self, x):
        sin, cos = self.rotary(x.shape[-1])
        mask = torch.zeros(1, device=x.device)
        x = x * sin.mean()
        x = self.two(x)
        return x * cos.mean() + mask


def test_what_depends_on_sizes_alone_hides_no_cut():
    names = {alias for point in trace(Beside(), IMAGES).points for alias in point.aliases}
    assert {"one", "two", "two.0"} <= names
    paired = pair_blocks(Beside().eval(), Beside(), IMAGES, ["one", "two.0"])
    blocks = nn.ModuleList([paired.student, *paired.student_blocks]).eval().double()
    x = IMAGES.double()
    for block in blocks[1:]:
        x = block(x)
    assert torch.equal(x, paired.student(IMAGES.double()))


class OnTheNumber(Net):
    def middle(self, x):
        return self.two(x) if x.shape[0] > 1 else self.two(-x)


class OnMultiples(Net):
    """Two and three images give the same answer, more may not."""

    def middle(self, x):
        return self.two(x) if x.shape[0] * 3 > 5 else self.two(-x)


class OnNumbers(Net):
    def middle(self, x):
        return self.two(x) if x.max() < 1e9 else x


@pytest.mark.parametrize("kind", [OnTheNumber, OnMultiples, OnNumbers], ids=lambda kind: kind.__name__)
def test_what_the_images_decide_is_not_frozen(kind):
    with pytest.raises(CutError, match="decides what Python does, and it depends on the images"):
        trace(kind(), IMAGES)
    inside = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), kind())
    traced = trace(inside, IMAGES)
    assert "depends on the images" in traced.whole["1"]
    blocks = nn.Sequential(*traced.split([traced.points[0]]))
    for count in (1, 4):
        assert torch.equal(blocks(IMAGES[:count]), inside(IMAGES[:count]))


class OverwritesWhatIsNeeded(Net):
    def middle(self, x):
        x[:, 1] = 0.0
        return self.two(x)


def test_a_student_that_cannot_be_trained_is_called_that():
    with pytest.raises(
        ModelError, match="OverwritesWhatIsNeeded cannot be trained: .*modified by an inplace operation"
    ):
        pair_blocks(Net().eval(), OverwritesWhatIsNeeded(), IMAGES, ["one"])


def test_len_is_python_s_own_again():
    with pytest.raises(CutError):
        trace(OnNumbers(), IMAGES)
    assert len.__module__ == "builtins" and len([1, 2]) == 2
    assert torch.zeros.__module__ == "torch" and "expand" not in vars(torch.Tensor)
