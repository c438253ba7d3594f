"""Where a number was measured: the machine and the versions, as plain JSON types."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch

import stablekd_fast

PACKAGES = (
    "torchvision",
    "numpy",
    "triton",
    "safetensors",
    "scikit-learn",
    "pillow",
    "matplotlib",
    "rich",
    "jsonargparse",
    "timm",
    "torchdistill",
    "tensorboard",
)

version = functools.cache(importlib.metadata.version)
"""Reads the version of a package once: a run asks for each several times, and its files take milliseconds."""


def machine() -> dict:
    """Platform, CPU model, cores (of the machine, and those this process may use), bytes of memory, threads, GPUs."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict:
    """Versions of Python, of this package and of the packages it stands on, as far as they are installed."""
    found = {
        "python": platform.python_version(),
        "stablekd_fast": stablekd_fast.__version__,
        "torch": torch.__version__,  # with its build, as in 2.6.0+cpu
        "cuda": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {name: str(value) for name, value in found.items() if value is not None}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def usable_cores() -> int | None:
    """The cores that this process may run on, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every platform says
        return None
