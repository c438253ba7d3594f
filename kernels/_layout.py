"""Feature maps as flat memory: which channel and which sample an element belongs to.

A feature map `[N, ..., C, ...]` that fills its memory without gaps, samples one after another, is the same thing
in every memory format: element i of the memory belongs to channel `(i // inner) % channels` and to sample
`i // (numel / N)`. Contiguous `[N, C, H, W]` has `inner = H * W`, channels-last has `inner = 1`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeatureLayout(NamedTuple):
    """Memory of a feature map as a contiguous `[outer, channels, inner]`, `outer` being a multiple of `samples`."""

    samples: int
    outer: int
    channels: int
    inner: int

    @property
    def numel(self) -> int:
        return self.outer * self.channels * self.inner

    @property
    def per_sample(self) -> int:
        return self.channels * self.inner * (self.outer // self.samples)


def dense(features: Tensor) -> Tensor:
    """`features` itself if it fills its memory with samples one after another; otherwise a contiguous copy."""
    expected = 1
    by_stride = sorted(_extents(features), key=lambda extent: extent[0])
    for stride, size in by_stride:
        if stride != expected:
            return features.contiguous()
        expected *= size
    outermost = features.shape[0] == 1 or features.stride(0) * features.shape[0] == features.numel()
    return features if outermost else features.contiguous()


def laid_out_as(target: Tensor, model: Tensor) -> Tensor:
    """`target` itself if its elements lie in memory in the order of the dense `model`; otherwise such a copy."""
    if _extents(target) == _extents(model):
        return target
    return target.new_empty(model.shape).as_strided(model.shape, model.stride()).copy_(target)


def feature_layout(features: Tensor, channel_axis: int) -> FeatureLayout:
    """The layout of a dense, non-empty feature map."""
    channels = features.shape[channel_axis]
    inner = features.stride(channel_axis) if channels > 1 else 1
    return FeatureLayout(features.shape[0], features.numel() // (channels * inner), channels, inner)


def _extents(features: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the axes that matter: an axis of size 1 may have any stride."""
    return [(stride, size) for stride, size in zip(features.stride(), features.shape) if size != 1]
