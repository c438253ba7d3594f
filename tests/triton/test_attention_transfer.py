"""The Triton kernels of attention_transfer against the reference in float64."""

from itertools import product

import pytest
import torch

from stablekd_fast.kernels import _triton_finish
from stablekd_fast.kernels.attention_transfer import reference
from stablekd_fast.kernels.attention_transfer import triton_impl as kernels
from stablekd_fast.kernels.attention_transfer.reference import Operands
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SINGLE = (torch.float32, torch.float32)


def operands(device, n=3, c=5, d=7, h=4, w=6, dtypes=SINGLE, layouts=(torch.contiguous_format,) * 2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = (torch.randn(n, channels, h, w, generator=generator) for channels in (c, d))
    spread = 0.5 + torch.rand(n, 1, h, w, generator=generator)  # otherwise maps of many channels are nearly constant
    student, target = (x * s for x, s in zip(maps, (spread, 1.5 / spread)))
    return tuple(
        x.to(device, dtype).contiguous(memory_format=layout)
        for x, dtype, layout in zip((student, target), dtypes, layouts)
    )


def check(student, target, factor=1000.0, upstream=None):
    """Loss and gradient against the reference on the same operands in float64."""
    expected_loss, expected = reference.attention_transfer_with_grad(
        Operands(student.double(), target.double(), 2.0), factor, upstream
    )
    loss, grad = kernels.attention_transfer_with_grad(Operands(student, target, 2.0), factor, upstream)
    assert loss.dtype == torch.float32 and loss.shape == () and grad.dtype == student.dtype
    assert grad.stride() == torch.empty_like(student).stride()
    epsilon, finfo = torch.finfo(torch.float32).eps, torch.finfo(student.dtype)
    scale = abs(factor * (1.0 if upstream is None else upstream.item()))
    places = student.shape[2] * student.shape[3]
    torch.testing.assert_close(
        loss.double(), expected_loss.double(), rtol=32 * epsilon, atol=4 * epsilon**2 * scale / places
    )
    # Places where the maps nearly agree are as inexact as the others, relative to the largest.
    atol = 64 * epsilon * expected.abs().max().item() + finfo.smallest_normal * finfo.eps
    torch.testing.assert_close(grad.double(), expected, rtol=finfo.eps, atol=atol)
    alone = kernels.attention_transfer(Operands(student, target, 2.0))
    assert torch.equal(alone, kernels.attention_transfer_with_grad(Operands(student, target, 2.0), 1.0, None)[0])


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
def test_agrees_with_float64(device, dtypes):
    student, target = operands(device, dtypes=dtypes)
    for dtype in (torch.float32, torch.float64):
        check(student, target, upstream=torch.tensor(-3.0, device=device, dtype=dtype))


@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)), ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 16, 16, 8, 8), (3, 3, 40, 5, 5), (1, 70, 9, 1, 2), (2, 1, 2, 3, 9), (1, 24, 8, 20, 14)], ids=str
)
def test_shapes_and_layouts(device, sizes, layouts):
    check(*operands(device, *sizes, layouts=layouts))
    check(*operands(device, *sizes, layouts=layouts, dtypes=(torch.bfloat16, torch.float16)))


@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)), ids=str)
@pytest.mark.parametrize("channels", [(16, 33), (260, 17), (100, 128)])
def test_any_number_of_channels(device, channels, layouts):
    check(*operands(device, 1, *channels, 2, 3, layouts=layouts))


@pytest.mark.parametrize("places", [(1, 17), (16, 16), (64, 65)])
def test_any_number_of_places(device, places):
    check(*operands(device, 1, 3, 2, *places))


def test_tokens(device):
    """`[N, T, C]` seen as maps: channels lie side by side, and the last axis has one place."""
    student, target = (torch.randn(2, 11, channels, device=device) for channels in (24, 16))
    check(*(x.movedim(2, 1).unsqueeze(3) for x in (student, target)))


@pytest.mark.parametrize("nearness", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_as_exact_as_pytorch(device, dtype, nearness):
    """Channels-last: those of contiguous maps are added one by one by the interpreter, as they are on no chip."""

    def near(seed):
        away, target = operands(device, 2, 32, 32, 9, 9, layouts=(torch.channels_last,) * 2, seed=seed)
        return (target + nearness * away).to(dtype), target.to(dtype)

    def plain(student, target):
        maps = [torch.nn.functional.normalize(x.pow(2).mean(1).flatten(1), dim=1) for x in (student, target)]
        return (maps[0] - maps[1]).pow(2).mean()

    def fused(student, target):
        return kernels.attention_transfer_with_grad(Operands(student, target, 2.0), 1.0, None)

    assert_as_exact_as_pytorch(fused, plain, [near(seed) for seed in range(4)])


def test_maps_without_length(device):
    student, target = operands(device)
    zero, away = torch.zeros_like(student), torch.zeros_like(target)
    for a, b in ((student, away), (zero, target), (zero, away)):
        got = kernels.attention_transfer_with_grad(Operands(a, b, 2.0), 1.0, None)
        expected = reference.attention_transfer_with_grad(Operands(a, b, 2.0), 1.0, None)
        assert got[1].isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_what_is_not_a_number_shows(device):
    for place in range(2):
        pair = operands(device)
        pair[place][1, 2, 3, 3] = torch.nan
        assert kernels.attention_transfer_with_grad(Operands(*pair, 2.0), 1.0, None)[0].isnan()


def test_operands_need_not_be_contiguous(device):
    student, target = operands(device, 4, 6, 8, 6, 6)
    check(student[:, ::2, :, 1:], target[:, ::2, 1:, :].transpose(2, 3))
    check(student[1:], target[:1].expand(3, -1, -1, -1))
    check(student.transpose(2, 3), target)
    memory = torch.randn(3 * 5 * 4 * 6 + 1, device=device)
    check(memory[1:].view(3, 5, 4, 6), memory[1:].view(3, 5, 4, 6) + 0.5)  # not at a multiple of 16 bytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_is_written(device, layout, monkeypatch):
    student, target = operands(device, 3, 70, 5, 5, 7, layouts=(layout, layout))
    poisoned(monkeypatch)
    loss, grad = kernels.attention_transfer_with_grad(Operands(student, target, 2.0), 1.0, None)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    "dtype, samples, power", [(torch.float64, 3, 2.0), (torch.float32, 0, 2.0), (torch.float32, 3, 1.5)]
)
def test_what_is_left_to_the_reference(device, launches, dtype, samples, power):
    """Double precision, empty batches, other powers."""
    given = Operands(*(x[:samples] for x in operands(device, dtypes=(dtype, dtype))), power)
    got = kernels.attention_transfer_with_grad(given, 2.0, None)
    expected = reference.attention_transfer_with_grad(given, 2.0, None)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(kernels.attention_transfer(given) * 2, expected[0], equal_nan=True)
    assert not launches


def test_three_launches_give_loss_and_gradient(device, launches):
    kernels.attention_transfer_with_grad(Operands(*operands(device), 2.0), 1.0, None)
    assert [one.kernel for one in launches] == ["attention_maps", "attention_pulls", "attention_gradient"]


def test_the_host_never_waits(monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    for module in (kernels, _triton_finish):
        monkeypatch.setattr(module, "launch", lambda *_: None)
    student, target = operands("meta")
    upstream = torch.tensor(-3.0, dtype=torch.float64, device="meta")
    loss, grad = kernels.attention_transfer_with_grad(Operands(student, target, 2.0), 2.0, upstream)
    assert loss.shape == () and grad.shape == student.shape


def test_variants_are_listed_once():
    listed = [entry.variant for entry in kernels.specialisations()]
    assert len(listed) == len(set(listed))
