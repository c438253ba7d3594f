"""`conv_act` against torch's convolution, addition and ReLU in float64."""

import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stablekd_fast import kernels
from stablekd_fast.errors import first_line
from stablekd_fast.kernels._checks import OperandError
from stablekd_fast.kernels.conv_act import reference

conv_act = sys.modules["stablekd_fast.kernels.conv_act"]  # the name in `kernels` is that of the function
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
REFUSAL = RuntimeError("GET was unable to find an engine to execute this computation (cuDNN)")
CASES = [
    # images, channels, outputs, side, kernel, stride, padding, dilation
    (4, 16, 16, 8, 3, 1, 1, 1), (2, 3, 8, 9, 3, 2, 1, 1), (2, 8, 16, 6, 1, 2, 0, 1), (3, 8, 8, 10, 3, 1, 2, 2),
]  # fmt: skip


def operands(case, dtype, device, layout=torch.channels_last):
    count, channels, outputs, side, kernel, stride, padding, dilation = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, side, side, generator=generator)
    weight = 0.2 * torch.randn(outputs, channels, kernel, kernel, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    sizes = {name: (value, value) for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))}
    residual = torch.randn(F.conv2d(x, weight, None, **sizes).shape, generator=generator)
    maps = [t.to(device, dtype).contiguous(memory_format=layout) for t in (x, weight, residual)]
    return maps[0], maps[1], bias.to(device, dtype), maps[2], sizes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_three_operations_of_torch(case, dtype, added, device):
    x, weight, bias, residual, sizes = operands(case, dtype, device)
    residual = residual if added else None
    if device == "cuda":  # memory that is used again may hold anything
        del [torch.full((1 << 22,), torch.nan, device=device, dtype=dtype) for _ in range(4)][:]
    found = kernels.conv_act(x, weight, bias, residual, **sizes)

    def plain(kind):
        y = F.conv2d(x.to(kind), weight.to(kind), bias.to(kind), **sizes)
        return F.relu(y if residual is None else y + residual.to(kind))

    exact, eager = plain(torch.float64), plain(dtype)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    error, allowed = ((y.double() - exact).abs().max() for y in (found, eager))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_residual_must_be_is_known_before_anything_is_computed(case):
    """The result's shape is torch's, and a residual of another one never reaches an operator."""
    x, weight, bias, residual, sizes = operands(case, torch.float32, "cpu")
    for unfit in (residual[:1], residual[:, :1], residual[..., 1:, :], residual[..., 1:]):
        counter = FlopCounterMode(display=False)
        with counter, pytest.raises(OperandError, match="must have the result's shape"):
            kernels.conv_act(x, weight, bias, unfit, **sizes)
        assert counter.get_total_flops() == 0
    assert kernels.conv_act(x, weight, bias, residual, **sizes).shape == residual.shape


@pytest.mark.parametrize("added", [True, False])
def test_where_cudnn_has_no_joined_form_the_reference_serves_and_that_is_said_once(monkeypatch, added):
    x, weight, bias, residual, sizes = operands(CASES[0], torch.float32, "cpu")
    given, asked = (x, weight, bias, residual if added else None, *sizes.values()), []

    def refuses(*_):
        asked.append(1)
        raise REFUSAL

    monkeypatch.setattr(conv_act, "_refused", set())
    assert kernels.implementations()["conv_act"]["cuda"] == "cuDNN"
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, refuses)
    with pytest.warns(RuntimeWarning, match="conv_act: GET was unable .* The reference is used"):
        first = conv_act._by_cudnn(*given)
    assert torch.equal(first, reference.conv_act(*given)) and torch.equal(conv_act._by_cudnn(*given), first)
    assert asked == [1]
    row = kernels.implementations()["conv_act"]
    assert row["cuda"] == "reference" and row["reason"].endswith("on CUDA " + first_line(REFUSAL)), "what `info` shows"


def test_another_error_is_not_taken_for_it(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    x, weight, bias, _, sizes = operands(CASES[0], torch.float32, "cpu")
    monkeypatch.setattr(torch, "cudnn_convolution_relu", fails)
    with pytest.raises(torch.OutOfMemoryError):
        conv_act._by_cudnn(x, weight, bias, None, *sizes.values())


def test_opcheck():
    x, weight, bias, residual, sizes = operands(CASES[0], torch.float32, "cpu")
    for added in (None, residual):
        arguments = (x, weight, bias, added, *(list(value) for value in sizes.values()))
        torch.library.opcheck(torch.ops.stablekd.conv_act.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(16, 16, 3, 3, dtype=torch.float64)}, "weight is float64"),
        ({"residual": torch.zeros(4, 16, 8, 8, dtype=torch.float16)}, "residual is float16"),
        (
            {"residual": torch.zeros(4, 16, 1, 1)},
            r"residual is float32 \[4, 16, 1, 1\]; it must have the result's shape",
        ),
        (
            {"residual": torch.zeros(4, 16, 3, 5)},
            r"residual is float32 .*; it must have the result's shape, \[4, 16, 8, 8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, weight, bias, residual, sizes = operands(CASES[0], torch.float32, "cpu")
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual} | sizes
    with pytest.raises(OperandError, match=message):
        kernels.conv_act(**(given | change))
