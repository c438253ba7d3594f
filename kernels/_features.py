"""Helpers of the operators on feature maps: checks of operands, targets stored as 8-bit codes, unit lengths."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import FLOATS, OperandError, describe
from stablekd_fast.kernels._layout import FeatureLayout, dense, feature_layout, laid_out_as

CODES = (torch.int8, torch.float8_e4m3fn)
"""Dtypes of stored activations: code times the scale of its channel gives the value."""

LENGTH_EPSILON = 1e-12


class FeatureOperands(Protocol):
    """The operands that all losses on feature maps have."""

    @property
    def student(self) -> Tensor: ...
    @property
    def target(self) -> Tensor: ...
    @property
    def target_scale(self) -> Tensor | None: ...
    @property
    def channel_axis(self) -> int: ...


def check_features(given: FeatureOperands) -> None:
    student, target, target_scale, channel_axis = given.student, given.target, given.target_scale, given.channel_axis
    if not (student.dim() >= 2 and student.is_floating_point() and student.dtype not in CODES):
        raise OperandError(
            f"student is {describe(student)}; it must be floating point with a batch axis and at least one more."
        )
    if not (target.shape == student.shape and (target.is_floating_point() or target.dtype in CODES)):
        raise OperandError(
            f"target is {describe(target)} but student {describe(student)}; they must have one shape, "
            "so bridge the widths or resize before comparing."
        )
    check_channel_axis(student, channel_axis)
    if target.dtype in CODES:
        check_scales(target, target_scale, channel_axis, "target")
    else:
        if target_scale is not None:
            raise OperandError(
                f"target_scale was given with a target that is {describe(target)}; "
                "only int8 and float8_e4m3fn have one."
            )


def check_channel_axis(features: Tensor, channel_axis: int) -> None:
    if not (-features.dim() <= channel_axis < features.dim() and channel_axis % features.dim() != 0):
        raise OperandError(
            f"channel_axis={channel_axis} was given for {describe(features)}; "
            "it must name an axis other than the batch."
        )


def check_scales(codes: Tensor, scales: Tensor | None, channel_axis: int, name: str) -> None:
    samples, channels = codes.shape[0], codes.shape[channel_axis]
    if not (
        scales is not None and scales.dtype == torch.float32 and list(scales.shape) in ([channels], [samples, channels])
    ):
        raise OperandError(
            f"{name} is {describe(codes)} and its scale {'None' if scales is None else describe(scales)}; "
            f"such codes need a float32 scale per channel, [{channels}], or per sample and channel, "
            f"[{samples}, {channels}]."
        )


def dequantized(codes: Tensor, scales: Tensor | None, channel_axis: int, dtype: torch.dtype) -> Tensor:
    """Return `codes` times their scales in `dtype`; tensors without scales are only converted."""
    values = codes.to(dtype)
    if scales is None:
        return values
    return values * per_channel(scales.to(dtype), values, channel_axis)


def per_channel(scales: Tensor, features: Tensor, channel_axis: int) -> Tensor:
    """Shape scales `[C]` or `[N, C]` to broadcast over features whose channels lie on `channel_axis`."""
    shape = [1] * features.dim()
    shape[channel_axis] = features.shape[channel_axis]
    if scales.dim() == 2:
        shape[0] = features.shape[0]
    return scales.reshape(shape)


def scale_stride(scales: Tensor | None, layout: FeatureLayout) -> int:
    """Return the elements between the scales of one sample and the next: 0 where all samples have the same."""
    return layout.channels if scales is not None and scales.dim() == 2 else 0


def length(features: Tensor, axes: list[int]) -> Tensor:
    """Return the root of the sum of squares over `axes`, kept; its epsilon keeps all-zero features at zero."""
    return (features.square().sum(dim=axes, keepdim=True) + LENGTH_EPSILON).sqrt()


class DenseOperands(NamedTuple):
    """Student and target in one dense layout, and the gradient (or None) to be written in that layout."""

    student: Tensor
    target: Tensor
    scales: Tensor | None
    gradient: Tensor | None
    layout: FeatureLayout


def dense_operands(given: FeatureOperands, with_gradient: bool) -> DenseOperands | None:
    """Return what the fused implementations take; None for double precision and tensors without elements."""
    student, target = given.student, given.target
    if student.dtype not in FLOATS or target.dtype not in (*FLOATS, *CODES) or student.numel() == 0:
        return None
    student = dense(student)
    target = laid_out_as(target, student)
    scales = None if given.target_scale is None else given.target_scale.contiguous()
    gradient = torch.empty_like(student) if with_gradient else None
    return DenseOperands(student, target, scales, gradient, feature_layout(student, given.channel_axis))
