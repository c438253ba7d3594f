"""Settings of the teacher cache."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stablekd_fast.cache.codecs import check_codecs
from stablekd_fast.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass
class CacheSettings:
    """Which of the teacher's outputs are kept, where, and by which codec."""

    plan: Literal["auto", "all", "none"] = "auto"
    """`auto` keeps what the planner expects to pay, `all` every output that is used, `none` nothing."""
    directory: str | None = None
    """Where rows are kept on disk, for this run and later ones; None keeps none on disk."""
    disk_budget: str | None = None
    """Most bytes in the directory, e.g. 200GB; None for what the disk has."""
    host_budget: str = "0"
    """Most bytes of rows in main memory, for this run only."""
    device_budget: str = "0"
    """Most bytes of rows in the GPU's memory, for this run only."""
    codecs: list[str] = field(default_factory=lambda: ["fp32"])
    """Codecs allowed for activations, the preferred one first: fp32, bf16, int8, fp8. All but fp32 change numbers."""
    logits: str = "fp32"
    """Codec of the logits: fp32, fp16, or topK, e.g. top10."""
    images: bool = False
    """Keep the augmented images of large data sets on disk too (uint8), so that later epochs decode no files."""
    verify: bool = False
    """Compare checksums at every reading, not at a row's first one only."""

    def __post_init__(self) -> None:
        check_codecs(self.codecs, self.logits)
        for tier in ("disk", "host", "device"):
            self.budget(tier)
        if self.directory is None and (self.images or self.disk_budget is not None):
            raise ConfigError("cache.images and cache.disk_budget need a place on disk; give --cache.directory.")

    @property
    def keeps_rows(self) -> bool:
        """Whether there is a place for rows, and the plan may use it."""
        places = self.directory is not None or self.budget("host") or self.budget("device")
        return self.plan != "none" and (bool(places) or self.plan == "all")

    @property
    def folder(self) -> Path | None:
        """The directory as a path; None keeps no rows on disk."""
        return None if self.directory is None else Path(self.directory).expanduser()

    def budget(self, tier: str) -> int | None:
        """Most bytes of rows on `device`, `host` or `disk`; None for what the disk has. Raises ConfigError."""
        text = getattr(self, f"{tier}_budget")
        return None if text is None else parse_bytes(text, f"cache.{tier}_budget")


def parse_bytes(text: str, name: str) -> int:
    """Read `"200GB"` and the like as a number of bytes (powers of ten). Raises ConfigError naming the setting."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kMGT]?)B?\s*", str(text))
    if not match:
        raise ConfigError(f"{name}={text!r} was given; write a number of bytes such as 500MB, 200GB or 1.5TB.")
    return int(float(match[1]) * _UNITS[match[2]])
