"""Cases of `augment_batch`: against torchvision's transforms, and against indexing in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from stablekd_fast import kernels
from stablekd_fast.bench import rivals
from stablekd_fast.bench.core import Case, Contender
from stablekd_fast.bench.floor import floor_contenders
from stablekd_fast.bench.losses import Setting

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
    # torchvision cannot crop each sample of a batch differently. One crop and no flip for all is the rival on the
    # easiest terms; sample by sample does what is asked.
    shared = replace(draw, offsets=draw.offsets[:1].expand_as(draw.offsets), flips=torch.zeros_like(draw.flips))
    mean, std = (torch.tensor(values, device=setting.device) for values in (MEAN, STD))
    stores = {"NHWC store": draw.images.permute(0, 3, 1, 2), "NCHW store": draw.images.permute(0, 3, 1, 2).contiguous()}
    contenders = [
        Contender(
            "torchvision-one-crop",
            lambda store=store: _torchvision_one_crop(store, shared),
            variant,
            expected=lambda: _torchvision_per_sample(stores["NCHW store"], shared, torch.float64),
        )
        for variant, store in stores.items()
    ]
    contenders += [
        Contender("torchvision-per-sample", lambda store=store: _torchvision_per_sample(store, draw), variant)
        for variant, store in stores.items()
    ]
    operands = (draw.images, draw.rows, draw.offsets, draw.flips, PADDING, mean, std)
    contenders.append(Contender("eager", lambda: rivals.augment(*operands)))
    if setting.compile:
        compiled = torch.compile(rivals.augment, dynamic=False)
        contenders.append(Contender("compiled", lambda: compiled(*operands)))
    contenders += [Contender("stablekd", lambda last=last: _ours(draw, last), name) for name, last in LAYOUTS.items()]
    pixels = batch * SIDE * SIDE * 3
    contenders += floor_contenders(pixels, 4 * pixels, setting.device)
    return Case(
        "kernels",
        f"augment_batch {batch}x3x{SIDE}x{SIDE}",
        contenders,
        "torchvision-one-crop",
        lambda: _torchvision_per_sample(stores["NCHW store"], draw, torch.float64),
        TOLERANCE,
        {"bytes": 5 * pixels},
    )


LAYOUTS = {"channels_last": True, "contiguous": False}


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
