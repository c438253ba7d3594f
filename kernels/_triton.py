"""Triton kernels on demand.

They are imported with the first CUDA tensor, and replaced by the reference where they do not compile. Triton launches
on the current device, wherever its operands lie: so theirs is made the current one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from stablekd_fast.kernels._checks import OperandError

missing: str | None = None if find_spec("triton") else "Triton is not installed; `pip install triton` brings it"

_FAILURES: dict[str, str] = {}


def implementation(module: str, name: str, reference: Callable) -> Callable:
    """Return what calls `name` of `<module>.triton_impl`, or `reference` from its first compilation failure on."""

    def run(*arguments):
        if name not in _FAILURES:
            try:
                with torch.cuda.device(_device(name, arguments)):
                    return getattr(import_module(f"{module}.triton_impl"), name)(*arguments)
            except Exception as error:
                if not _is_compilation_failure(error):
                    raise
                _FAILURES[name] = f"the Triton kernel does not compile here ({type(error).__name__}: {error})"
                warnings.warn(f"{name}: {_FAILURES[name]}. The reference is used.", RuntimeWarning, stacklevel=2)
        return reference(*arguments)

    return run


def _device(name: str, arguments: tuple[Any, ...]) -> torch.device:
    """Return where the operands lie. Raises OperandError unless that is one device; torch lets a 0-dim tensor of the
    CPU through to operators on GPUs."""
    given = [value for one in arguments for value in (one if isinstance(one, tuple) else (one,))]
    found = {value.device for value in given if isinstance(value, Tensor)}
    if len(found) > 1:
        raise OperandError(
            f"{name} was given operands on {' and '.join(sorted(map(str, found)))}; move them to one device first."
        )
    return found.pop()


def failure(name: str) -> str | None:
    """Return why an operator's kernel is no longer used; None while it is."""
    return _FAILURES.get(name)


def _is_compilation_failure(error: Exception) -> bool:
    """Recognise errors of Triton's own, and its complaint when there is no C compiler for the launcher."""
    return type(error).__module__.split(".")[0] == "triton" or "C compiler" in str(error)
