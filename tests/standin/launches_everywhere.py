"""Run by test_launches.py without Triton's interpreter: prints each launch of each operator on `cuda:1` as JSON."""

import json
import sys
from importlib import import_module

import torch

from stablekd_fast.bench.standin import recorded_launches
from stablekd_fast.kernels import _triton


def features(dtype):
    return torch.empty(6, 24, 8, 8, dtype=dtype, device="cuda:1").to(memory_format=torch.channels_last)


def logits():
    return torch.empty(32, 96, device="cuda:1")


def calls():
    """Operators, and operands of the sizes of training."""
    labels = torch.empty(32, dtype=torch.int64, device="cuda:1")
    upstream = torch.empty((), device="cuda:1")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pair = features(dtype), features(dtype)
        for normalize in (None, "power", "channel", "l2"):
            yield "feature_mse", (*pair, None, normalize, None, 1), upstream
        yield "feature_cosine", (*pair, None, "position", 1), upstream
        yield "attention_transfer", (*pair, 2.0), upstream
    yield "kd_loss", (logits(), logits(), None, labels, 4.0, 0.9, 0.0, None), upstream
    yield "decoupled_kl", (logits(), logits(), labels, 4.0, 1.0, 8.0), upstream
    yield "grouped_kl", (logits(), logits(), 4.0, 0.9, 1.0, 1.0), upstream
    yield "correlation", (logits(), logits(), 1.0, 1.0, 1.0), upstream
    yield "standardised_kd_loss", (logits(), logits(), labels, 2.0, 9.0, 1.0), upstream
    yield "quantize_rows", (features(torch.float32), torch.int8, 1), None
    vectors = [torch.empty(24, device="cuda:1") for _ in range(4)]
    running = (*vectors[2:], torch.empty((), dtype=torch.int64, device="cuda:1"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        maps = [features(dtype) for _ in range(3)]
        yield "batch_norm_act", (*maps[:2], *vectors[:2], *running, 0.1, 1e-5, True), None
        yield "batch_norm_act_backward", (*maps, *vectors, 1e-5, True, True), None
    codes = features(torch.float32).to(torch.int8)
    yield "dequantize_rows", (codes, torch.empty(6, 24, device="cuda:1"), torch.bfloat16, 1), None
    images = torch.empty(20, 12, 12, 3, dtype=torch.uint8, device="cuda:1")
    rows, offsets = (
        torch.empty(8, dtype=torch.int64, device="cuda:1"),
        torch.empty(8, 2, dtype=torch.int64, device="cuda:1"),
    )
    flips = torch.empty(8, dtype=torch.bool, device="cuda:1")
    yield "augment_batch", (images, rows, offsets, flips, 2, [0.5] * 3, [0.2] * 3, torch.bfloat16, True), None


def main():
    with recorded_launches() as (stand, launches):
        side = torch.cuda.Stream(1)
        stand.streams[1] = side
        for name, operands, upstream in calls():
            module = f"stablekd_fast.kernels.{name.removesuffix('_backward')}"
            names = [name] if upstream is None else [name, f"{name}_with_grad"]
            for called in names:
                arguments = operands
                if upstream is not None:
                    given = import_module(f"{module}.reference").Operands(*operands)
                    arguments = (given,) if called == name else (given, 1.0, upstream)
                first = len(launches)
                _triton.implementation(module, called, None)(*arguments)
                made = [[one.device, one.stream == side.number, sorted(one.operands)] for one in launches[first:]]
                assert stand.index == 0, "the current device comes back"
                print(json.dumps([called, made, _triton.failure(called)]))


sys.exit(main())
