"""Modes of a network for a while: evaluation, and a run that leaves no trace."""

from __future__ import annotations

import contextlib

import torch
from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """`model.eval()` for a while; every submodule's own flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def untouched(model: nn.Module):
    """Run the model in any mode without a trace: buffers and random state come back afterwards."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(gpus)), torch.no_grad():
            yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])
