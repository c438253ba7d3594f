"""The Triton kernels of feature_mse and feature_cosine against the references in float64."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.kernels import _features_triton, _sample_triton, _triton_finish
from stablekd_fast.kernels.feature_cosine import reference as cosine_reference
from stablekd_fast.kernels.feature_cosine import triton_impl as cosine_kernels
from stablekd_fast.kernels.feature_cosine.reference import Operands as CosineOperands
from stablekd_fast.kernels.feature_mse import reference as mse_reference
from stablekd_fast.kernels.feature_mse import triton_impl as mse_kernels
from stablekd_fast.kernels.feature_mse.reference import Operands as MSEOperands
from stablekd_fast.kernels.quantize_rows import reference as codec
from tests.kernels.precision import assert_as_exact_as_pytorch, poisoned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
KINDS = [None, "power", "given power", "channel", "l2", "position", "sample"]
kernels = (mse_kernels, cosine_kernels)

# NumPy, which interprets the kernels, remarks on lanes whose values are never used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings(r"ignore:var\(\). degrees of freedom:UserWarning"),  # of empty maps, by the reference
]


def operands(device, *shape, dtypes=(torch.float32, torch.float32), layout=torch.contiguous_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, target = (torch.randn(*shape, generator=generator) for _ in range(2))
    target = 0.5 * target + 0.3
    if layout == torch.channels_last:
        student, target = (x.contiguous(memory_format=layout) for x in (student, target))
    return student.to(device, dtypes[0]), target.to(device, dtypes[1])


def run(modules, kind, student, target, scales=None, axis=1, factor=1.0, upstream=None):
    """Loss and gradient of one kind of feature loss by `modules` (of feature_mse, of feature_cosine)."""
    if kind in ("position", "sample"):
        return modules[1].feature_cosine_with_grad(
            CosineOperands(student, target, scales, kind, axis), factor, upstream
        )
    power = torch.tensor(0.7, device=student.device) if kind == "given power" else None
    normalize = "power" if power is not None else kind
    return modules[0].feature_mse_with_grad(
        MSEOperands(student, target, scales, normalize, power, axis), factor, upstream
    )


def by_triton(*arguments, **options):
    return run((mse_kernels, cosine_kernels), *arguments, **options)


def by_reference(*arguments, **options):
    return run((mse_reference, cosine_reference), *arguments, **options)


def check(kind, student, target, scales=None, axis=1, factor=2.0, upstream=None):
    """Loss and gradient against the reference on the same operands in float64."""
    wide_target = target.double() if scales is None else target
    expected_loss, expected = by_reference(kind, student.double(), wide_target, scales, axis, factor, upstream)
    loss, grad = by_triton(kind, student, target, scales, axis, factor, upstream)
    assert loss.dtype == torch.float32 and loss.shape == () and grad.dtype == student.dtype
    assert grad.stride() == torch.empty_like(student).stride()
    epsilon, finfo = torch.finfo(torch.float32).eps, torch.finfo(student.dtype)
    scale = abs(factor * (1.0 if upstream is None else upstream.item()))
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=16 * epsilon, atol=4 * epsilon * scale)
    # Elements where student and target nearly agree are as inexact as the large ones, relative to the largest.
    atol = 32 * epsilon * expected.abs().max().item() + finfo.smallest_normal
    torch.testing.assert_close(grad.double(), expected, rtol=finfo.eps, atol=atol)


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64(device, kind, dtypes):
    student, target = operands(device, 3, 5, 7, 3, dtypes=dtypes)
    for dtype in (torch.float32, torch.float64):
        check(kind, student, target, upstream=torch.tensor(-3.0, device=device, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (1, 3, 1, 1), (3, 1, 9, 9), (5, 40, 2, 4), (2, 3, 40, 60)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_layouts(device, kind, layout, shape):
    if kind == "position" and shape[1] == 1:
        return  # The angle between numbers has the gradient 0, of which only rounding is left.
    check(kind, *operands(device, *shape, layout=layout))
    check(kind, *operands(device, *shape, layout=layout, dtypes=(torch.bfloat16, torch.float16)))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens(device, kind):
    student, target = operands(device, 3, 37, 24)
    check(kind, student, target, axis=2)
    check(kind, student.transpose(1, 2), target.transpose(1, 2), axis=1)
    check(kind, student.view(3, 37, 4, 6), target.view(3, 37, 4, 6), axis=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_may_be_8_bit_codes(device, kind, codes, layout):
    student, target = operands(device, 4, 11, 5, 3, layout=layout)
    stored, scales = codec.quantize_rows(target, codes, 1)
    check(kind, student, stored, scales)
    check(kind, student.bfloat16(), stored, scales[1].contiguous())


@pytest.mark.parametrize("channels", [2, 16, 100, 130, 520, 1030, 2048])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_number_of_channels(device, layout, channels):
    check("position", *operands(device, 2, channels, 3, 2, layout=layout))
    check("channel", *operands(device, 2, channels, 3, 2, layout=layout))


def test_many_channels_side_by_side(device, launches):
    check("position", *operands(device, 3, 8192), axis=1)
    assert launches
    launches.clear()
    check("position", *operands(device, 1, 2049, 2, 2))
    assert not launches


def plain_loss(kind):
    def loss(student, target):
        if kind == "position":
            return 1 - F.cosine_similarity(student, target, dim=1).mean()
        if kind == "sample":
            return 1 - F.cosine_similarity(student.flatten(1), target.flatten(1), dim=1).mean()
        if kind == "l2":
            student, target = (F.normalize(x.flatten(1), dim=1) for x in (student, target))
            return F.mse_loss(student, target, reduction="sum") / len(student)
        if kind == "channel":
            variance, mean = torch.var_mean(target, (0, 2, 3), correction=0, keepdim=True)
            deviation = (variance + mse_reference.CHANNEL_EPSILON).sqrt()
            return F.mse_loss((student - mean) / deviation, (target - mean) / deviation)
        power = {None: 1.0, "power": target.square().mean(), "given power": 0.7}[kind]
        return F.mse_loss(student, target) / power

    return loss


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nearness", [1.0, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_pytorch(device, kind, nearness, dtype):
    def near(seed):
        away, target = operands(device, 4, 32, 9, 9, seed=seed)
        return (target + nearness * away).to(dtype), target.to(dtype)

    def fused(student, target):
        return by_triton(kind, student, target)

    assert_as_exact_as_pytorch(fused, plain_loss(kind), [near(seed) for seed in range(4)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_mean_far_from_zero_does_not_spoil_the_variance(device, layout):
    student, target = (x * 1e-2 + 1e3 for x in operands(device, 6, 3, 40, 40, layout=layout))
    loss, _ = by_triton("channel", student, target)
    expected, _ = by_reference("channel", student.double(), target.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_features_without_length_or_variance(device, kind):
    student, target = operands(device, 2, 3, 4, 4)
    dead = torch.zeros_like(target)
    for a, b in ((student, dead), (dead, target), (dead, dead), (student, dead + 2.0)):
        got, expected = by_triton(kind, a, b), by_reference(kind, a, b)
        assert got[1].isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected[1].abs().max().item() + 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_shows(device, kind):
    for place in range(2):
        pair = operands(device, 2, 3, 4, 4)
        pair[place][1, 2, 3, 3] = torch.nan
        assert by_triton(kind, *pair)[0].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_operands_need_not_be_contiguous(device, kind):
    student, target = operands(device, 4, 6, 5, 5)
    check(kind, student[:, ::2, :, 1:], target[:, ::2, :, 1:])
    check(kind, student[1:], target[:1].expand(3, -1, -1, -1))
    check(kind, student.contiguous(memory_format=torch.channels_last), target)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_written(device, kind, layout, monkeypatch):
    student, target = operands(device, 3, 5, 7, 3, layout=layout)
    stored, scales = codec.quantize_rows(target, torch.int8, 1)
    poisoned(monkeypatch)
    for operand in ((target, None), (stored, scales)):
        loss, grad = by_triton(kind, student, *operand)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_alone_is_the_same(device, kind):
    student, target = operands(device, 2, 3, 8, 8)
    if kind in ("position", "sample"):
        alone = cosine_kernels.feature_cosine(CosineOperands(student, target, None, kind, 1))
    else:
        power = torch.tensor(0.7, device=device) if kind == "given power" else None
        alone = mse_kernels.feature_mse(
            MSEOperands(student, target, None, kind if power is None else "power", power, 1)
        )
    assert torch.equal(alone, by_triton(kind, student, target)[0])


def test_double_precision_empty_maps_and_huge_extents_are_left_to_the_reference(device, launches):
    for kind in KINDS:
        student, target = operands(device, 2, 3, 4, dtypes=(torch.float64, torch.float32))
        torch.testing.assert_close(by_triton(kind, student, target), by_reference(kind, student, target))
        by_triton(kind, *operands(device, 0, 3, 4))
    student, target = operands("meta", 1, 2, 2**19 + 1)
    assert _features_triton.aligned_operands(MSEOperands(student, target, None, None, None, 1), True) is None
    assert not launches


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits(kind, codes, monkeypatch):
    # Meta tensors have no values, so anything that reads one back to the host raises.
    for module in (mse_kernels, cosine_kernels, _sample_triton, _triton_finish):
        monkeypatch.setattr(module, "launch", lambda *_: None)
    student, target = operands("meta", 2, 3, 4, 4)
    scales = torch.empty(2, 3, device="meta") if codes else None
    upstream = torch.tensor(-3.0, dtype=torch.float64, device="meta")
    loss, grad = by_triton(kind, student, target.to(torch.int8) if codes else target, scales, upstream=upstream)
    assert loss.shape == () and grad.shape == student.shape


@pytest.mark.parametrize("extent", [1, 2, 3, 7, 49, 1000, 12544, 2**19])
def test_splitting_is_exact(device, extent):
    import triton
    import triton.language as tl

    @triton.jit
    def split_all(out_at, extent, BLOCK: tl.constexpr):
        value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        quotient, rest = _features_triton.split(value, extent)
        tl.store(out_at + value, quotient * extent + rest)
        tl.store(out_at + 2**20 + value, rest)

    globals().update(_features_triton=_features_triton, tl=tl)
    out = torch.empty(2, 2**20, dtype=torch.int32, device=device)
    split_all[(256,)](out, torch.tensor(extent).item(), BLOCK=4096)
    values = torch.arange(2**20, dtype=torch.int32, device=device)
    assert torch.equal(out[0], values) and torch.equal(out[1], values % extent)


@pytest.mark.parametrize("module", kernels)
def test_variants_are_listed_once(module):
    variants = [entry.variant for entry in module.specialisations()]
    assert len(variants) == len(set(variants))


def test_programs_are_laid_out_in_whole_warps():
    """The interpreter takes any number of them, a GPU only powers of two."""
    for channels_last in (True, False):
        for channels in (1, 3, 8, 17, 64, 384, 1000, 2048, 4096):
            tiling = cosine_kernels._tiling(channels_last, channels)
            for number in tiling[1:]:
                assert type(number) is int and number & (number - 1) == 0, tiling
            assert 4 <= tiling.warps <= 16 and tiling.channels >= channels
