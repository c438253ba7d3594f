"""Cases of the operators on feature maps: feature losses and 8-bit rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.bench.core import Case, Contender
from stablekd_fast.bench.floor import FLOOR, floor_contenders
from stablekd_fast.bench.operators import rivals
from stablekd_fast.bench.operators.losses import Loss, Setting, loss_case, random_features

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
FLOAT, BFLOAT = torch.float32, torch.bfloat16
DEEP, WIDE, SMALL = (128, 256, 14, 14), (64, 64, 56, 56), (16, 32, 8, 8)


class Map(NamedTuple):
    """Shape, dtype and memory format of the student's features."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: torch.memory_format

    def __str__(self) -> str:
        layout = "channels_last" if self.layout == CHANNELS_LAST else "contiguous"
        return f"{'x'.join(map(str, self.shape))} {_name(self.dtype)} {layout}"

    def draw(self, seed: int, device: str) -> Tensor:
        return random_features(*self, device, seed)


FLOAT_MAPS = [Map(DEEP, FLOAT, CONTIGUOUS), Map(DEEP, FLOAT, CHANNELS_LAST), Map(WIDE, FLOAT, CHANNELS_LAST)]
ALL_MAPS = [*FLOAT_MAPS, Map(WIDE, FLOAT, CONTIGUOUS), Map(DEEP, BFLOAT, CHANNELS_LAST)]
QUICK_MAPS = [Map(SMALL, FLOAT, CHANNELS_LAST)]

PLAIN = {None: rivals.mse, "power": rivals.power_mse, "channel": rivals.channel_mse, "l2": rivals.l2_mse}
COSINES = {"position": rivals.position_cosine, "sample": rivals.sample_cosine}


def feature_mse_cases(setting: Setting) -> Iterator[Case]:
    for normalize, plain in PLAIN.items():
        for features in QUICK_MAPS if setting.quick else ALL_MAPS:
            yield _mse_case(features, normalize, plain, setting)
    for features in QUICK_MAPS if setting.quick else [Map(DEEP, FLOAT, CHANNELS_LAST)]:
        yield _given_power_case(features, setting)
    for features, code in _coded(setting):
        yield _coded_case(features, code, setting)


def feature_cosine_cases(setting: Setting) -> Iterator[Case]:
    for per, plain in COSINES.items():
        for features in QUICK_MAPS if setting.quick else FLOAT_MAPS:
            student, target = (features.draw(seed, setting.device) for seed in (0, 1))
            name = f"per {per} {features}"
            yield loss_case(Loss("feature_cosine", name, student, (target,), plain, (target,), {"per": per}), setting)


def attention_transfer_cases(setting: Setting) -> Iterator[Case]:
    for features in QUICK_MAPS if setting.quick else ALL_MAPS:
        student, target = (features.draw(seed, setting.device) for seed in (0, 1))
        loss = Loss("attention_transfer", str(features), student, (target,), rivals.attention_transfer, (target,))
        yield loss_case(loss, setting)


def quantize_rows_cases(setting: Setting) -> Iterator[Case]:
    for features, code in _coded(setting):
        yield _quantize_case(features, code, setting)


def dequantize_rows_cases(setting: Setting) -> Iterator[Case]:
    for features, code in _coded(setting):
        yield _dequantize_case(features, code, setting)


def _mse_case(features: Map, normalize: str | None, plain: Callable, setting: Setting) -> Case:
    student, target = (features.draw(seed, setting.device) for seed in (0, 1))
    name = f"{normalize or 'plain'} {features}"
    return loss_case(Loss("feature_mse", name, student, (target,), plain, (target,), {"normalize": normalize}), setting)


def _given_power_case(features: Map, setting: Setting) -> Case:
    student, target = (features.draw(seed, setting.device) for seed in (0, 1))
    power = target.square().mean()
    options = {"normalize": "power", "scale": power}
    name = f"power, given, {features}"
    return loss_case(
        Loss("feature_mse", name, student, (target,), rivals.scaled_mse, (target, power), options), setting
    )


def _coded_case(features: Map, code: torch.dtype, setting: Setting) -> Case:
    """Time an 8-bit target; beside it, as `stablekd-wide-target`, the same values already in the student's dtype."""
    student = features.draw(0, setting.device)
    codes, scales = kernels.quantize_rows(features.draw(1, setting.device), code)
    wide = kernels.dequantize_rows(codes, scales, features.dtype)
    beside = Contender(
        "stablekd-wide-target",
        lambda: kernels.feature_mse_with_grad(student, wide),
        role="ours",
        extras={"bytes": student.nbytes + wide.nbytes + student.nbytes},
    )
    name = f"plain, {_name(code)} target, {features}"
    loss = Loss("feature_mse", name, student, (codes,), rivals.coded_mse, (codes, scales), {"target_scale": scales})
    return loss_case(loss, setting, (beside,))


def _quantize_case(features: Map, code: torch.dtype, setting: Setting) -> Case:
    rows = features.draw(0, setting.device)
    # A code may fall to either side of a tie: one step of the largest codes.
    step = 1 / 127 if code == torch.int8 else 32 / 448
    return _codec_case(
        f"quantize_rows {_name(code)} {features}",
        setting,
        (rows,),
        lambda rows: rivals.quantize(rows, code),
        lambda: kernels.quantize_rows(rows, code),
        lambda: rivals.quantize(rows.double(), code),
        (1.01 * step, 1e-6),
    )


def _dequantize_case(features: Map, code: torch.dtype, setting: Setting) -> Case:
    codes, scales = kernels.quantize_rows(features.draw(0, setting.device), code)
    return _codec_case(
        f"dequantize_rows {_name(code)} to {features}",
        setting,
        (codes, scales),
        lambda codes, scales: rivals.dequantize(codes, scales, features.dtype),
        lambda: kernels.dequantize_rows(codes, scales, features.dtype),
        lambda: rivals.dequantize(codes, scales.double(), torch.float64),
        1e-6 if features.dtype == FLOAT else 4e-3,
    )


def _codec_case(
    name: str,
    setting: Setting,
    operands: tuple[Tensor, ...],
    plain: Callable,
    ours: Callable,
    expected: Callable,
    tolerance: float | tuple[float, ...],
) -> Case:
    contenders = [Contender("eager", lambda: plain(*operands))]
    if setting.compile:
        compiled = torch.compile(plain, dynamic=False)
        contenders.append(Contender("compiled", lambda: compiled(*operands)))
    result = ours()
    read = sum(tensor.nbytes for tensor in operands)
    written = sum(tensor.nbytes for tensor in ([result] if isinstance(result, Tensor) else result))
    contenders += [Contender("stablekd", ours, role="ours"), *floor_contenders(read, written, setting.device)]
    return Case("kernels", name, contenders, "eager", expected, tolerance, {"bytes": read + written}, FLOOR)


def _coded(setting: Setting) -> list[tuple[Map, torch.dtype]]:
    if setting.quick:
        return [(QUICK_MAPS[0], torch.int8)]
    maps = [Map(DEEP, FLOAT, CONTIGUOUS), Map(DEEP, FLOAT, CHANNELS_LAST), Map(DEEP, BFLOAT, CHANNELS_LAST)]
    return [(features, torch.int8) for features in maps] + [(maps[1], torch.float8_e4m3fn)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
