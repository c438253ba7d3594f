"""Cases of `augment_batch`: against torchvision's transforms, and against indexing in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from stablekd_fast import kernels
from stablekd_fast.bench.core import Case, Contender
from stablekd_fast.bench.floor import FLOOR, floor_contenders
from stablekd_fast.bench.operators import rivals
from stablekd_fast.bench.operators.losses import Setting

SIDE, PADDING, IMAGES = 32, 4, 10_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Draw:
    """A batch to be made: which images of the store `[M, H, W, C]`, how cropped, which mirrored."""

    images: Tensor
    rows: Tensor
    offsets: Tensor
    flips: Tensor


def augment_batch_cases(setting: Setting) -> Iterator[Case]:
    for batch in (128,) if setting.quick else (128, 1024):
        yield _case(batch, setting)


def _case(batch: int, setting: Setting) -> Case:
    draw = _draw(batch, setting.device)
    by_pixel = draw.images.permute(0, 3, 1, 2)
    stores = {"NHWC store": by_pixel, "NCHW store": by_pixel.contiguous()}
    pixels = batch * SIDE * SIDE * 3
    return Case(
        "kernels",
        f"augment_batch {batch}x3x{SIDE}x{SIDE}",
        [
            *_torchvision(stores, draw),
            *_indexing(draw, setting),
            Contender("stablekd", lambda: _ours(draw, channels_last=True), role="ours"),
            Contender("stablekd-contiguous", lambda: _ours(draw, channels_last=False), role="ours"),
            *floor_contenders(pixels, 4 * pixels, setting.device),
        ],
        "torchvision-one-crop",
        lambda: _torchvision_per_sample(by_pixel, draw, torch.float64),
        TOLERANCE,
        {"bytes": 5 * pixels},
        FLOOR,
    )


def _torchvision(stores: dict[str, Tensor], draw: Draw) -> list[Contender]:
    """Return torchvision's contenders.

    torchvision cannot crop each sample of a batch differently. Sample by sample it does what is asked; one crop and no
    flip for the whole batch is the rival on easier terms.
    """
    shared = replace(draw, offsets=draw.offsets[:1].expand_as(draw.offsets), flips=torch.zeros_like(draw.flips))
    found = []
    for variant, store in stores.items():
        one_crop = partial(_torchvision_one_crop, store, shared)
        expected = partial(_torchvision_per_sample, store, shared, torch.float64)
        found.append(Contender("torchvision-one-crop", one_crop, variant, expected=expected))
        found.append(Contender("torchvision-per-sample", partial(_torchvision_per_sample, store, draw), variant))
    return found


def _indexing(draw: Draw, setting: Setting) -> list[Contender]:
    mean, std = (torch.tensor(values, device=setting.device) for values in (MEAN, STD))
    operands = (draw.images, draw.rows, draw.offsets, draw.flips, PADDING, mean, std)
    found = [Contender("eager", partial(rivals.augment, *operands))]
    if setting.compile:
        found.append(Contender("compiled", partial(torch.compile(rivals.augment, dynamic=False), *operands)))
    return found


def _draw(batch: int, device: str) -> Draw:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    rows = torch.randint(IMAGES, (batch,), generator=generator)
    offsets = torch.randint(2 * PADDING + 1, (batch, 2), generator=generator)
    flips = torch.rand(batch, generator=generator) < 0.5
    return Draw(*(tensor.to(device) for tensor in (images, rows, offsets, flips)))


def _ours(draw: Draw, channels_last: bool) -> Tensor:
    return kernels.augment_batch(
        draw.images, draw.rows, draw.offsets, draw.flips,
        padding=PADDING, mean=MEAN, std=STD, channels_last=channels_last,
    )  # fmt: skip


def _torchvision_one_crop(store: Tensor, draw: Draw) -> Tensor:
    top, left = draw.offsets[0].tolist()
    crops = v2.crop(v2.pad(store[draw.rows], [PADDING]), top, left, SIDE, SIDE)
    return _normalised(crops, torch.float32)


def _torchvision_per_sample(store: Tensor, draw: Draw, dtype: torch.dtype = torch.float32) -> Tensor:
    crops = []
    for row, (top, left), flip in zip(draw.rows.tolist(), draw.offsets.tolist(), draw.flips.tolist()):
        crop = v2.crop(v2.pad(store[row], [PADDING]), top, left, SIDE, SIDE)
        crops.append(v2.horizontal_flip(crop) if flip else crop)
    return _normalised(torch.stack(crops), dtype)


def _normalised(crops: Tensor, dtype: torch.dtype) -> Tensor:
    return v2.normalize(v2.to_dtype(crops, dtype, scale=True), list(MEAN), list(STD))
