"""Contexts for running a network: in evaluation mode, or without a trace."""

from __future__ import annotations

import contextlib
import linecache
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import graph_module


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode; every submodule gets its own flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """A context in which the model can run in any mode; buffers and random state are put back afterwards."""
    held = {id(module._buffers): module._buffers for module in model.modules()}.values()
    saved = [(buffers, name, buffer, buffer.clone()) for buffers in held for name, buffer in _there(buffers)]
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(gpus)), torch.no_grad():
            yield
    finally:
        for buffers, name, buffer, values in saved:
            buffers[name] = buffer  # some networks put another one in its place
            buffer.copy_(values)


def _there(buffers: dict[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in buffers.items() if buffer is not None]


@contextlib.contextmanager
def sources_forgotten() -> Iterator[None]:
    """A context after which the sources that torch.fx wrote in it are gone: it keeps them for tracebacks as long as the
    process lives, a tenth of a megabyte for each pair that is cut."""
    before = set(linecache.cache)
    try:
        yield
    finally:
        kept = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
        for name in set(linecache.cache) - before:
            if name.startswith("<eval_with_key>"):
                del linecache.cache[name]
                kept.pop(name, None)
