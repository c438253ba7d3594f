"""How activations lie, and how the teacher's are mapped to the student's places."""

import pytest
import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks import describe_blocks, pair_blocks
from stablekd_fast.blocks.bridge import Bridge, fit_bridge
from stablekd_fast.blocks.layout import Resampling, layout_of
from stablekd_fast.cache.fingerprint import bridge_digest
from stablekd_fast.errors import CutError


@pytest.mark.parametrize(
    ("shape", "axis", "image", "grid", "leading"),
    [
        ((64, 56, 56), 1, (224, 224), (56, 56), 0),
        ((56, 56, 64), -1, (224, 224), (56, 56), 0),
        ((8, 25, 25), 1, (224, 224), (25, 25), 0),
        ((196, 384), -1, (224, 224), (14, 14), 0),
        ((197, 384), -1, (224, 224), (14, 14), 1),
        ((198, 384), -1, (224, 224), (14, 14), 2),
        ((201, 384), -1, (224, 224), (14, 14), 5),
        ((384, 196), 1, (224, 224), (14, 14), 0),
        ((151, 8), -1, (160, 240), (10, 15), 1),
        ((150, 8), -1, (240, 160), (15, 10), 0),
        ((16, 7, 5), 1, (100, 75), (7, 5), 0),
        ((16, 196, 8), -1, (224, 224), None, 0),  # sixteen windows of 196 tokens
        ((64,), 1, (224, 224), None, 0),
        ((1, 64), -1, (224, 224), None, 0),
        ((77, 64), -1, (), None, 0),  # words
        ((2, 12, 14, 14), 1, (224, 224), None, 0),
    ],
)
def test_a_grid_is_found_by_the_proportions_of_the_image(shape, axis, image, grid, leading):
    layout = layout_of(shape, axis, image)
    assert (layout.grid, layout.leading) == (grid, leading)
    assert layout.channels == shape[axis if axis < 0 else axis - 1]


def test_layouts_fit_where_places_are_equal_or_both_are_grids():
    image = (32, 32)
    tokens, fewer, map_, windows, pooled = (
        layout_of(*what, image) for what in (((65, 8), -1), ((17, 6), -1), ((4, 16, 16), 1), ((4, 9, 8), -1), ((8,), 1))
    )
    assert tokens.fits(fewer) and tokens.fits(map_) and map_.fits(tokens)
    assert windows.fits(windows) and pooled.fits(pooled)
    assert not windows.fits(map_) and not pooled.fits(map_) and not tokens.fits(pooled)


def resampled(values, given, wanted, image=(32, 32)):
    return Resampling(layout_of(*given, image), layout_of(*wanted, image))(values)


def test_a_coarser_grid_gets_the_mean_of_what_each_place_covers():
    x = torch.arange(16.0).reshape(1, 4, 4, 1)
    y = resampled(x, ((4, 4, 1), -1), ((2, 2, 1), -1))
    assert y.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    uneven = resampled(torch.arange(9.0).reshape(1, 3, 3, 1), ((3, 3, 1), -1), ((2, 2, 1), -1))
    assert uneven.flatten().tolist() == [2.0, 3.0, 5.0, 6.0]  # places that are covered in part count whole


def test_a_finer_grid_is_interpolated_between_the_centres_of_places():
    x = torch.tensor([0.0, 4.0, 8.0, 12.0]).reshape(1, 2, 2, 1)
    rows = resampled(x, ((2, 2, 1), -1), ((4, 4, 1), -1)).reshape(4, 4)
    assert rows[0].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert rows[:, 0].tolist() == [0.0, 2.0, 6.0, 8.0]


def test_tokens_are_a_grid_row_by_row():
    x = torch.arange(16.0).reshape(1, 16, 1)
    assert torch.equal(resampled(x, ((16, 1), -1), ((4, 4, 1), -1)), x.reshape(1, 4, 4, 1))
    assert resampled(x, ((16, 1), -1), ((2, 2, 1), -1)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    wide = torch.arange(8.0).reshape(1, 8, 1)
    assert torch.equal(resampled(wide, ((8, 1), -1), ((2, 4, 1), -1), (16, 32)), wide.reshape(1, 2, 4, 1))


def test_leading_tokens_are_handed_on_dropped_or_the_mean():
    x = torch.cat([torch.tensor([100.0, 200.0]), torch.arange(4.0)]).reshape(1, 6, 1)
    two, one, none, three = (((4 + n, 1), -1) for n in (2, 1, 0, 3))
    assert resampled(x, two, one).flatten().tolist() == [100.0, 0.0, 1.0, 2.0, 3.0]
    assert resampled(x, two, none).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert resampled(x, two, three).flatten().tolist() == [100.0, 200.0, 1.5, 0.0, 1.0, 2.0, 3.0]
    assert resampled(x[:, 2:], none, two).flatten().tolist() == [1.5, 1.5, 0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4)])
def test_a_bridge_maps_width_layout_and_places_at_once(sizes):
    """The order of the two maps depends on which is cheaper; the result does not."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, sizes[0], sizes[0], generator=generator)
    weight = torch.randn(2, 5, generator=generator)
    image = (32, 32)
    given = layout_of((5, sizes[0], sizes[0]), 1, image)
    wanted = layout_of((sizes[1] ** 2 + 1, 2), -1, image)
    y = Bridge(weight, 1, -1, "given", Resampling(given, wanted))(x)
    mapped = torch.einsum("sc,nchw->nshw", weight, x)
    grid = (
        nn.functional.avg_pool2d(mapped, 2)
        if sizes[0] > sizes[1]
        else nn.functional.interpolate(mapped, 4, mode="bilinear")
    )
    tokens = grid.flatten(2).movedim(1, 2)
    torch.testing.assert_close(y, torch.cat([tokens.mean(1, keepdim=True), tokens], 1))


def test_rows_of_another_map_are_other_rows():
    image = (32, 32)
    layouts = [layout_of(shape, -1, image) for shape in ((17, 4), (16, 4), (4, 4, 4), (2, 2, 4))]
    bridges = [None, Bridge(None, -1, -1)] + [
        Bridge(None, -1, -1, places=Resampling(layouts[0], wanted)) for wanted in layouts[1:]
    ]
    assert len({bridge_digest(bridge) for bridge in bridges}) >= 4  # tokens and map of one grid hold the same numbers


class Vit(nn.Module):
    def __init__(self, width, depth, patch, leading=1):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.leading = nn.Parameter(torch.randn(1, leading, width))
        layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.layers(torch.cat([self.leading.expand(len(x), -1, -1), x], 1))
        return self.head(x[:, 0])


def convnet(*widths):
    layers = []
    for inside, width in zip((3, *widths), widths):
        layers.append(nn.Sequential(nn.Conv2d(inside, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (lambda: Vit(16, 6, 4), lambda: convnet(6, 8, 12)),
        (lambda: convnet(6, 8, 12), lambda: Vit(16, 6, 4)),
        (lambda: Vit(16, 6, 4, 5), lambda: Vit(32, 6, 8, 2)),
        (lambda: models.build("torchvision/vit_b_16", 5, 32), lambda: models.build("resnet20", 5, 32)),
    ],
    ids=["tokens to maps", "maps to tokens", "other patches and tokens", "by name"],
)
def test_networks_of_different_grids_are_cut_into_blocks_of_even_cost(teacher, student):
    torch.manual_seed(0)
    paired = pair_blocks(teacher().eval(), student(), torch.randn(4, 3, 32, 32))
    assert max(paired.student_flops) < 0.6 * sum(paired.student_flops)
    assert len(paired) >= 3
    outputs = paired.teacher_outputs(torch.randn(2, 3, 32, 32))
    for k, cut in enumerate(paired.cuts):
        assert outputs[k].shape[1:] == cut.student_shape
        paired.student_blocks[k + 1](outputs[k])
    assert any("->" in row["bridge"] for row in describe_blocks(paired)[:-1] if row["bridge"])


def test_cuts_of_different_grids_can_be_named_and_those_without_a_grid_cannot():
    teacher, student = Vit(16, 6, 4).eval(), convnet(6, 8, 12)
    paired = pair_blocks(teacher, student, torch.randn(2, 3, 32, 32), [("layers.1", "0"), ("layers.4", "2")])
    assert [bridge.extra_repr().split(", ", 2)[2] for bridge in paired.bridges] == [
        "8x8 after 1 token(s) -> 16x16",
        "8x8 after 1 token(s) -> 4x4",
    ]
    with pytest.raises(CutError, match=r"\[65, 16\], the student \[12\] per image.*cuts that would do: 0.0, 0.1"):
        pair_blocks(teacher, student, torch.randn(2, 3, 32, 32), [("layers.1", "4")])


def test_block_lists_of_different_grids():
    teacher, student = convnet(4, 4, 4), convnet(8, 8)
    lists = [teacher[:2], teacher[2:]], [student[:1], student[1:]]
    paired = pair_blocks(teacher, student, torch.randn(4, 3, 32, 32), teacher_blocks=lists[0], student_blocks=lists[1])
    assert paired.teacher_outputs(torch.randn(2, 3, 32, 32))[0].shape == (2, 8, 16, 16)
    with pytest.raises(CutError, match=r"Shapes differ after block 0.*\[4, 8, 8\], the student \[8\]"):
        lists = [teacher[:2], teacher[2:]], [student[:4], student[4:]]
        pair_blocks(teacher, student, torch.randn(4, 3, 32, 32), teacher_blocks=lists[0], student_blocks=lists[1])


def test_the_widest_activations_are_fitted_with_the_places_kept():
    activation = torch.randn(8, 17, 6)
    layouts = [layout_of(shape, axis, (32, 32)) for shape, axis in (((17, 6), -1), ((3, 2, 2), 1))]
    bridge = fit_bridge("select", activation, 3, -1, 1, Resampling(*layouts))
    chosen = bridge.weight.argmax(1)
    pooled = activation[:, 1:, chosen].reshape(8, 2, 2, 2, 2, 3).mean((2, 4))
    torch.testing.assert_close(bridge(activation), pooled.movedim(-1, 1))
