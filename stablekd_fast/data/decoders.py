"""Which source feeds a run: images in device memory, DALI, or torchvision's decoder in threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from stablekd_fast.data.crops import Crops, Decoder
from stablekd_fast.data.dali import DaliDecoder, dali_missing, dali_remark
from stablekd_fast.data.split import Split
from stablekd_fast.data.torchvision_decoder import ThreadDecoder
from stablekd_fast.errors import ConfigError, nearest

SourceName = Literal["auto", "resident", "dali", "torchvision", "dali-stream"]
STREAM = "dali-stream"
"""The source whose views have no names: see `dali_stream.py`."""


@dataclass(frozen=True)
class SourceChoice:
    """The source that was chosen, and why."""

    name: str
    reason: str


def pick_source(name: str, split: Split, device: torch.device, *, scaled: bool = False) -> SourceChoice:
    """Choose the source of named views.

    `auto`: small images lie in device memory; large ones are decoded by DALI where it is installed, else by
    torchvision, which also decodes them where `scaled` decoding is asked for. Raises ConfigError for a source that
    cannot serve these images.
    """
    if name not in get_args(SourceName):
        raise ConfigError(f"source={name!r} was given{nearest(name, get_args(SourceName))}.")
    if name == STREAM:
        raise ConfigError(
            f"Named views are needed here, which source={STREAM} does not give; use auto, dali or torchvision."
        )
    if split.resident:
        if name not in ("auto", "resident"):
            raise ConfigError(
                f"source={name} decodes large images, but these are small and kept in memory; use auto or resident."
            )
        return SourceChoice("resident", f"the images are small: all of them are kept in the memory of {device.type}")
    if name == "resident":
        raise ConfigError(
            "source=resident keeps images of up to 64 pixels in memory, but these are larger; use auto, dali or "
            "torchvision."
        )
    if scaled:
        if name == "dali":
            raise ConfigError("scaled_decode was asked for, which source=dali cannot do; choose torchvision or auto.")
        return SourceChoice("torchvision", "scaled_decode was asked for, which DALI cannot do")
    if name != "auto":
        return SourceChoice(name, "asked for")
    missing = dali_missing()
    if missing:
        return SourceChoice("torchvision", missing)
    reason = "it decodes no more of an image than is needed"
    if device.type == "cuda":
        remark = dali_remark()
        reason += f", on the GPU ({remark})" if remark else ", on the GPU"
    return SourceChoice("dali", reason)


def make_decoder(
    choice: SourceChoice, crops: Crops, batch_size: int, workers: int, depth: int, device: torch.device
) -> Decoder:
    """Make the decoder of a source of large images, for batches of up to `batch_size` of them, `depth` ahead."""
    if choice.name == "dali":
        return DaliDecoder(crops, batch_size=batch_size, threads=workers, device=device, depth=depth)
    return ThreadDecoder(crops, batch_size=batch_size, workers=workers, pinned=device.type == "cuda", depth=depth)
