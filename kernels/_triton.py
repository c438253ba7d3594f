"""Triton kernels on demand.

They are imported with the first CUDA tensor, and replaced by the reference where they do not compile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

missing: str | None = None if find_spec("triton") else "Triton is not installed; `pip install triton` brings it"

_FAILURES: dict[str, str] = {}


def implementation(module: str, name: str, reference: Callable) -> Callable:
    """Return what calls `name` of `<module>.triton_impl`, or `reference` from its first compilation failure on."""

    def run(*arguments):
        if name not in _FAILURES:
            try:
                return getattr(import_module(f"{module}.triton_impl"), name)(*arguments)
            except Exception as error:
                if not _is_compilation_failure(error):
                    raise
                _FAILURES[name] = f"the Triton kernel does not compile here ({type(error).__name__}: {error})"
                warnings.warn(f"{name}: {_FAILURES[name]}. The reference is used.", RuntimeWarning, stacklevel=2)
        return reference(*arguments)

    return run


def failure(name: str) -> str | None:
    """Return why an operator's kernel is no longer used; None while it is."""
    return _FAILURES.get(name)


def _is_compilation_failure(error: Exception) -> bool:
    """Recognise errors of Triton's own, and its complaint when there is no C compiler for the launcher."""
    return type(error).__module__.split(".")[0] == "triton" or "C compiler" in str(error)
