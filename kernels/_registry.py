"""Registration with torch's dispatcher, and the record of which implementation each operator uses on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stablekd_fast.kernels import _native

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {}


def define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    """Define `stablekd::<name>` with `reference` as its implementation on every device."""
    torch.library.define(f"stablekd::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"stablekd::{name}", "default", reference)
    torch.library.register_fake(f"stablekd::{name}", fake)
    _IMPLEMENTATIONS[name] = {"implementation": "reference", "reason": "the operator has no other implementation"}


def register_native(name: str, implementation: Callable) -> None:
    """Let the C++ core serve `stablekd::<name>` on the CPU, if the core is there."""
    if _native.core is None:
        _IMPLEMENTATIONS[name]["reason"] = _native.reason
        return
    torch.library.impl(f"stablekd::{name}", "cpu", implementation)
    _IMPLEMENTATIONS[name] = {"implementation": "C++ core", "reason": "the core is built and loads"}


def implementations() -> dict[str, dict[str, str]]:
    """For each operator, the `implementation` it uses on the CPU and the `reason` for the choice."""
    return {name: dict(entry) for name, entry in sorted(_IMPLEMENTATIONS.items())}
