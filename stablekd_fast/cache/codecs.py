"""How a tensor becomes a row: which parts it is stored as, and what comes back.

Activations: `fp32`, `bf16`, `int8` and `fp8` (e4m3), the last two with a float32 scale per sample and channel. Logits:
`fp32`, `fp16`, or the `topK` largest (`top10`) as float16 with the rest's total, spread evenly when they are read.
`fp32` is exact: what the teacher computed in 16 bits is stored in those 16 bits. Rows come back in the dtype and keep
the memory order of the tensor that they came from, so that a network meets what it meets with the live teacher, and
reading makes no transposed copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablekd_fast import kernels
from stablekd_fast.cache.shard import Part
from stablekd_fast.errors import ConfigError

ACTIVATION_CODECS = ("fp32", "bf16", "int8", "fp8")
LOGIT_CODECS = ("fp32", "fp16", "topK")
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class RowFormat:
    """The stored form of tensors `[N, *shape]` of one `dtype`.

    With `channels_last`, `[N, C, H, W]` lies in memory as `[N, H, W, C]` and is stored in that order.
    """

    codec: str
    shape: tuple[int, ...]
    channel_axis: int = 1
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    @staticmethod
    def of(codec: str, example: Tensor, channel_axis: int = 1) -> RowFormat:
        """The format for tensors shaped and laid out like `example` `[N, ...]`."""
        last = example.dim() == 4 and example.is_contiguous(memory_format=torch.channels_last)
        keeps_order = last and not example.is_contiguous()
        return RowFormat(codec, tuple(example.shape[1:]), channel_axis, keeps_order, example.dtype)

    @property
    def lossless(self) -> bool:
        """Whether a stored row decodes to the very bits that were encoded."""
        return self.codec in _PLAIN and self._plain_dtype == self.dtype

    @property
    def _plain_dtype(self) -> torch.dtype:
        return self.dtype if self.codec == "fp32" else _PLAIN[self.codec]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of a row, in the order of `encode` and `decode`."""
        if self.codec in _PLAIN:
            return (Part("rows", self._plain_dtype, self._stored_shape),)
        if self.codec in _EIGHT_BITS:
            scales = Part("scales", torch.float32, (self.shape[self._channel - 1],))
            return (Part("rows", _EIGHT_BITS[self.codec], self._stored_shape), scales)
        kept = top_of(self.codec)
        index = torch.int16 if self.shape[0] < 1 << 15 else torch.int32
        return (
            Part("values", torch.float16, (kept,)),
            Part("indices", index, (kept,)),
            Part("rest", torch.float32, (1,)),
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(part.bytes for part in self.parts)

    def encode(self, values: Tensor) -> list[Tensor]:
        """Turn `values` `[N, *shape]` into parts `[N, ...]`, contiguous and on the same device."""
        if self.codec in _PLAIN:
            return [self._to_memory_order(values).to(self._plain_dtype).contiguous()]
        if self.codec in _EIGHT_BITS:
            codes, scales = self._quantize(values)
            return [self._to_memory_order(codes).contiguous(), scales.contiguous()]
        top, indices = values.float().topk(top_of(self.codec), dim=1)
        rest = values.float().scatter(1, indices, -math.inf).logsumexp(1, keepdim=True)
        return [top.half(), indices.to(self.parts[1].dtype), rest]

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Turn parts `[N, ...]` back into values `[N, *shape]` of `dtype`, on the device of the parts."""
        if self.codec in _PLAIN:
            return self._from_memory_order(parts[0]).to(self.dtype)
        if self.codec in _EIGHT_BITS:
            return self._dequantize(self._from_memory_order(parts[0]), parts[1])
        top, indices, rest = parts
        classes = self.shape[0]
        others = classes - top.shape[1]
        values = (rest - math.log(others)).expand(-1, classes) if others else rest.new_zeros(len(top), classes)
        return values.scatter(1, indices.long(), top.float()).to(self.dtype)

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        return (*self.shape[1:], self.shape[0]) if self.channels_last else self.shape

    @property
    def _channel(self) -> int:
        """The axis of the channels in a batch, counted from the front."""
        return self.channel_axis % (len(self.shape) + 1)

    def _to_memory_order(self, values: Tensor) -> Tensor:
        return values.permute(0, 2, 3, 1) if self.channels_last else values

    def _from_memory_order(self, rows: Tensor) -> Tensor:
        return rows.permute(0, 3, 1, 2) if self.channels_last else rows

    def _quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.quantize_rows(values, _EIGHT_BITS[self.codec], channel_axis=self._channel)

    def _dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        return kernels.dequantize_rows(codes, scales, self.dtype, channel_axis=self._channel)


def top_of(codec: str) -> int:
    """How many logits the codec `topK` keeps. Raises ConfigError if the name is no such codec."""
    match = re.fullmatch(r"top([1-9]\d*)", codec)
    if not match:
        raise ConfigError(
            f"The codec {codec!r} does not exist; choose fp32, fp16, bf16, int8, fp8, or for logits top10."
        )
    return int(match[1])


def check_codecs(activations: Sequence[str], logits: str) -> None:
    """Raise ConfigError for a codec that does not exist, or that does not serve activations or logits."""
    for codec in activations:
        if codec not in ACTIVATION_CODECS:
            raise ConfigError(f"Activations have no codec {codec!r}; choose from {', '.join(ACTIVATION_CODECS)}.")
    if not activations:
        raise ConfigError(f"No codec was given for activations; choose from {', '.join(ACTIVATION_CODECS)}.")
    if logits not in ("fp32", "fp16"):
        top_of(logits)
