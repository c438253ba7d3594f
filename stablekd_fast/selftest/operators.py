"""Claims on the operators: on the device they agree with their references."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.kernels.attention_transfer import reference as attention_by
from stablekd_fast.kernels.augment_batch import reference as images_by
from stablekd_fast.kernels.correlation import reference as correlation_by
from stablekd_fast.kernels.decoupled_kl import reference as decoupled_by
from stablekd_fast.kernels.dequantize_rows import reference as values_by
from stablekd_fast.kernels.feature_cosine import reference as cosine_by
from stablekd_fast.kernels.feature_mse import Normalize
from stablekd_fast.kernels.feature_mse import reference as mse_by
from stablekd_fast.kernels.grouped_kl import reference as grouped_by
from stablekd_fast.kernels.kd_loss import reference as kd_by
from stablekd_fast.kernels.quantize_rows import reference as codes_by
from stablekd_fast.kernels.standardised_kd_loss import reference as standardised_by
from stablekd_fast.selftest.claim import Broken, Claim, NotHere, difference

LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""The largest error of a result by dtype, relative to its largest element. Losses are float32 whatever goes in."""


def _loss_agrees(
    device: torch.device, operator: Callable, exact: Callable, draw: Callable[[], tuple[Tensor, ...]]
) -> str:
    """Check loss and gradient on the device against `exact` in float64 on the same operands, in both dtypes."""
    found = []
    for dtype, largest in LARGEST_ERROR.items():
        student, target, *others = draw()
        student, target = student.to(dtype), target.to(dtype)
        ours = operator(*(x.to(device) for x in (student, target, *others)))
        truths = exact(student.double(), target.double(), *others)
        bounds = LARGEST_ERROR[torch.float32], largest
        errors = [_error(mine, truth, dtype, allowed) for mine, truth, allowed in zip(ours, truths, bounds)]
        found.append(f"{errors[-1]:.1g} of {largest:.1g} ({_short(dtype)})")
    return f"gradient's relative error {', '.join(found)}"


def _error(mine: Tensor, truth: Tensor, dtype: torch.dtype, allowed: float) -> float:
    """Return the error relative to the largest element of `truth`. Raises Broken if it is more than allowed."""
    error = ((mine.cpu().double() - truth).abs().max() / truth.abs().max()).item()
    if not error <= allowed:
        raise Broken(f"relative error {error:.2g} from {_short(dtype)}; at most {allowed:.2g} is allowed")
    return error


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _logits() -> tuple[Tensor, Tensor, Tensor]:
    return 3 * torch.randn(33, 100), 3 * torch.randn(33, 100), torch.randint(0, 100, (33,))


def _features() -> tuple[Tensor, Tensor]:
    """Draw two feature maps in the memory order of training."""
    one, other = (torch.randn(6, 24, 7, 7).to(memory_format=torch.channels_last) for _ in range(2))
    return one, other


def _kd_loss(device: torch.device) -> str:
    def exact(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return kd_by.kd_loss_with_grad(kd_by.Operands(s, t, None, labels, 4.0, 0.9, 0.1, None), 1.0, None)

    def ours(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.kd_loss_with_grad(s, t, labels, label_smoothing=0.1)

    return _loss_agrees(device, ours, exact, _logits)


def _decoupled_kl(device: torch.device) -> str:
    def exact(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return decoupled_by.decoupled_kl_with_grad(decoupled_by.Operands(s, t, labels, 4.0, 1.0, 8.0), 1.0, None)

    return _loss_agrees(device, lambda *x: kernels.decoupled_kl_with_grad(*x), exact, _logits)


def _grouped_kl(device: torch.device) -> str:
    def exact(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return grouped_by.grouped_kl_with_grad(grouped_by.Operands(s, t, 4.0, 0.9, 1.0, 1.0), 1.0, None)

    return _loss_agrees(device, lambda *x: kernels.grouped_kl_with_grad(*x), exact, lambda: _logits()[:2])


def _correlation(device: torch.device) -> str:
    def exact(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return correlation_by.correlation_with_grad(correlation_by.Operands(s, t, 1.0, 1.0, 1.0), 1.0, None)

    return _loss_agrees(device, lambda *x: kernels.correlation_with_grad(*x), exact, lambda: _logits()[:2])


def _standardised_kd_loss(device: torch.device) -> str:
    def exact(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        given = standardised_by.Operands(s, t, labels, 2.0, 1.0, 1.0)
        return standardised_by.standardised_kd_loss_with_grad(given, 1.0, None)

    return _loss_agrees(device, lambda *x: kernels.standardised_kd_loss_with_grad(*x), exact, _logits)


def _feature_mse(normalize: Normalize) -> Callable[[torch.device], str]:
    def exact(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return mse_by.feature_mse_with_grad(mse_by.Operands(s, t, None, normalize, None, 1), 1.0, None)

    def ours(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.feature_mse_with_grad(s, t, normalize=normalize)

    return lambda device: _loss_agrees(device, ours, exact, _features)


def _feature_cosine(device: torch.device) -> str:
    def exact(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return cosine_by.feature_cosine_with_grad(cosine_by.Operands(s, t, None, "position", 1), 1.0, None)

    return _loss_agrees(device, lambda *x: kernels.feature_cosine_with_grad(*x), exact, _features)


def _attention_transfer(device: torch.device) -> str:
    def exact(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return attention_by.attention_transfer_with_grad(attention_by.Operands(s, t, 2.0), 1.0, None)

    return _loss_agrees(device, lambda *x: kernels.attention_transfer_with_grad(*x), exact, _features)


def _batch_norm_act(device: torch.device) -> str:
    """Check the output and the gradient with respect to x. A large bias keeps all elements off the ReLU's kink."""
    x, residual = _features()
    weight, bias, gradient = torch.ones(24), torch.full((24,), 12.0), torch.randn_like(x)

    def run(dtype: torch.dtype, here: torch.device, vectors: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(here, dtype).requires_grad_()
        added, *given = residual.to(here, dtype), weight.to(here, vectors), bias.to(here, vectors)
        y = kernels.batch_norm_act(leaf, *given, residual=added)
        return y.detach(), torch.autograd.grad(y, leaf, gradient.to(here, dtype))[0]

    found = []
    for dtype, largest in LARGEST_ERROR.items():
        x, residual, gradient = (tensor.to(dtype) for tensor in (x, residual, gradient))
        truths = run(torch.float64, torch.device("cpu"), torch.float64)
        ours = run(dtype, device, torch.float32)
        errors = [_error(mine, truth, dtype, largest) for mine, truth in zip(ours, truths)]
        found.append(f"{errors[-1]:.1g} of {largest:.1g} ({_short(dtype)})")
    return f"gradient's relative error {', '.join(found)}"


def _same_bits(pairs: list[tuple[Tensor, Tensor]]) -> str:
    for mine, truth in pairs:
        if not torch.equal(mine.cpu().float(), truth.float()):
            raise Broken(f"{_short(mine.dtype)} differs from the reference by up to {difference([(mine, truth)]):.2g}")
    return "the reference's bits"


def _rows(device: torch.device) -> str:
    rows, pairs = _features()[0], []
    for dtype in (torch.int8, torch.float8_e4m3fn):
        truth = codes_by.quantize_rows(rows, dtype, 1)
        codes, scales = kernels.quantize_rows(rows.to(device), dtype)
        pairs += [(codes, truth[0]), (scales, truth[1])]
        for back in LARGEST_ERROR:
            values = kernels.dequantize_rows(codes, scales, back)
            pairs.append((values, values_by.dequantize_rows(*truth, back, 1)))
    return _same_bits(pairs)


def _augment_batch(device: torch.device) -> str:
    images = torch.randint(0, 256, (20, 9, 9, 3), dtype=torch.uint8)
    choices = torch.randint(0, 20, (16,)), torch.randint(0, 5, (16, 2)), torch.rand(16) < 0.5
    mean, std, pairs = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], []
    for dtype in LARGEST_ERROR:
        given = [x.to(device) for x in (images, *choices)]
        ours = kernels.augment_batch(*given, padding=2, mean=mean, std=std, dtype=dtype)
        pairs.append((ours, images_by.augment_batch(images, *choices, 2, mean, std, dtype, True)))
    return _same_bits(pairs)


LOST, APART = 1e-3, 0.01
"""The largest share of elements that float16 may lose, and the largest relative error of the gradient."""


def _fp16_gradients(device: torch.device) -> str:
    """Check a gradient at the size of a ResNet's first stage, where its elements are smaller than float16 can hold."""
    scale = torch.tensor(2.0**16, device=device)
    student, target = torch.randn(2, 64, 64, 56, 56, device=device).half()
    _, half = kernels.feature_mse_with_grad(student, target, upstream=scale)
    _, exact = kernels.feature_mse_with_grad(student.float(), target.float(), upstream=scale)
    lost = ((half == 0) & (exact != 0)).double().mean().item()
    apart = ((half.float() - exact).norm() / exact.norm()).item()
    found = f"{lost:.2g} of the elements are lost, relative error {apart:.2g}"
    if lost >= LOST or apart >= APART:
        raise Broken(f"{found}; less than {LOST:g} and {APART:g} are allowed")
    return found


def _every_gpu(device: torch.device) -> str:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise NotHere("needs two GPUs")
    given, current = _logits(), torch.cuda.current_device()
    _, expected = kernels.kd_loss_with_grad(*given)
    for number in range(torch.cuda.device_count()):
        _, found = kernels.kd_loss_with_grad(*(x.to(f"cuda:{number}") for x in given))
        _error(found, expected.double(), torch.float32, LARGEST_ERROR[torch.float32])
    if torch.cuda.current_device() != current:
        raise Broken("the current device has changed")
    return f"{torch.cuda.device_count()} GPUs, cuda:{current} current"


_NORMALIZES: tuple[Normalize, ...] = (None, "power", "channel", "l2")

_EXACT = "on the CPU in float64, same operands"

OPERATORS = [
    Claim("kd_loss agrees with float64", _kd_loss, _EXACT),
    Claim("decoupled_kl agrees with float64", _decoupled_kl, _EXACT),
    Claim("grouped_kl agrees with float64", _grouped_kl, _EXACT),
    Claim("correlation agrees with float64", _correlation, _EXACT),
    Claim("standardised_kd_loss agrees with float64", _standardised_kd_loss, _EXACT),
    *(Claim(f"feature_mse, normalize={n}, agrees with float64", _feature_mse(n), _EXACT) for n in _NORMALIZES),
    Claim("feature_cosine agrees with float64", _feature_cosine, _EXACT),
    Claim("attention_transfer agrees with float64", _attention_transfer, _EXACT),
    Claim("batch_norm_act agrees with float64", _batch_norm_act, _EXACT),
    Claim("quantize_rows, dequantize_rows give the reference's bits", _rows, "with the reference on the CPU"),
    Claim("augment_batch gives the reference's bits", _augment_batch, "with the reference on the CPU"),
    Claim("float16 gradients survive", _fp16_gradients, "with float32 at 64 x 64 x 56 x 56, scaled by 2^16"),
    Claim("every GPU computes, whichever is the current one", _every_gpu, "kd_loss on cuda:1, ... against the CPU"),
]
