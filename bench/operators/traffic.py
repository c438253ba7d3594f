"""Counts the bytes that the Triton kernels move in Triton's interpreter, against the least that an operator can move.

Every load and store of a launch is counted by its lanes that are not masked; repeated ones count each time, although a
chip's caches may serve them: above all the scales and weights of channels, which each element looks up, and which
`least` therefore holds per element. `python -m stablekd_fast.bench.operators.traffic` prints one JSON row per case, and
needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from stablekd_fast.errors import ConfigError
from stablekd_fast.kernels._features import FeatureOperands
from stablekd_fast.kernels.attention_transfer import reference as attention_transfer
from stablekd_fast.kernels.correlation import reference as correlation
from stablekd_fast.kernels.decoupled_kl import reference as decoupled_kl
from stablekd_fast.kernels.feature_cosine import reference as feature_cosine
from stablekd_fast.kernels.feature_mse import reference as feature_mse
from stablekd_fast.kernels.grouped_kl import reference as grouped_kl
from stablekd_fast.kernels.kd_loss import reference as kd_loss
from stablekd_fast.kernels.standardised_kd_loss import reference as standardised_kd_loss

LIMIT = 1.02
"""The largest ratio of moved to least bytes. It allows for partial sums, scales that several programs read, edges."""


class Case(NamedTuple):
    """A call of an operator, and how often each tensor's bytes have to be moved by the way that the kernel goes."""

    op: str
    name: str
    arguments: tuple
    tensors: list[tuple[Tensor, int]]
    """Each tensor with the number of its passes."""
    passes: str
    called: str | None = None
    """The function, where it is not called as the operator is."""


@dataclass(frozen=True)
class Traffic:
    """The bytes of one case. `least` counts every tensor as often as `passes` says."""

    op: str
    case: str
    passes: str
    moved: int
    least: int

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def cases() -> Iterator[Case]:
    yield from _logits_cases()
    yield from _correlation_cases()
    yield from _feature_cases()
    yield from _row_cases()
    yield _augment_case()
    yield from _norm_cases()


def count(case: Case) -> Traffic:
    """Run the case by the interpreter. Raises ConfigError without it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "Traffic is counted by Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported."
        )
    kernels = import_module(f"stablekd_fast.kernels.{case.op}.triton_impl")
    # A loss is run in the form that makes its gradient as well.
    function = getattr(kernels, f"{case.op}_with_grad", None) or getattr(kernels, case.called or case.op)
    with counted() as counter:
        function(*case.arguments)
    least = sum(tensor.numel() * tensor.itemsize * times for tensor, times in case.tensors)
    return Traffic(case.op, case.name, case.passes, counter.moved, least)


@contextmanager
def counted() -> Iterator[SimpleNamespace]:
    """Give a counter whose `moved` grows by the bytes of every load and store in the block."""
    from triton.runtime.interpreter import interpreter_builder as builder

    counter = SimpleNamespace(moved=0)
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(pointers, mask, *others):
        out = load(pointers, mask, *others)
        counter.moved += int(mask.data.sum()) * out.data.itemsize
        return out

    def counting_store(pointers, value, mask, *others):
        counter.moved += int(mask.data.sum()) * value.data.itemsize
        return store(pointers, value, mask, *others)

    # Loads and stores without a mask go through these two as well.
    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield counter
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _logits_cases() -> Iterator[Case]:
    for classes, passes in ((1000, 1), (10_000, 2)):
        rows = 64 if passes == 1 else 8
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (torch.randn(rows, classes).to(dtype) for _ in range(2))
            labels = torch.zeros(rows, dtype=torch.int64)
            tensors = [(student, passes), (teacher, passes), (labels, passes), (student, 1)]
            name, words = f"{rows}x{classes} {_short(dtype)}", f"logits {_times(passes)}, gradient once"
            of_kd = kd_loss.Operands(student, teacher, None, labels, 4.0, 0.9, 0.0, None)
            of_decoupled = decoupled_kl.Operands(student, teacher, labels, 4.0, 1.0, 8.0)
            yield Case("kd_loss", name, (of_kd, 1.0, None), tensors, words)
            yield Case("decoupled_kl", name, (of_decoupled, 1.0, None), tensors, words)
            if passes == 1:
                of_grouped = grouped_kl.Operands(student, teacher, 4.0, 0.9, 1.0, 1.0)
                without_labels = [(student, 2), (teacher, 1)]
                yield Case("grouped_kl", name, (of_grouped, 1.0, None), without_labels, words)
                of_standardised = standardised_kd_loss.Operands(student, teacher, labels, 2.0, 9.0, 1.0)
                yield Case("standardised_kd_loss", name, (of_standardised, 1.0, None), tensors, words)


def _correlation_cases() -> Iterator[Case]:
    """Each program over columns reads four numbers of each row, of which six are written and read for the gradient;
    each program over rows reads twice the four numbers that are written of each column."""
    for samples, classes, rows_each in ((64, 1000, 2), (100, 10, 16)):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (torch.randn(samples, classes).to(dtype) for _ in range(2))
            over_rows, over_columns = -(-samples // rows_each), -(-classes // 16)
            row, column = torch.empty(4, samples), torch.empty(4, classes)
            tensors = [(student, 6), (teacher, 5), (row, over_columns + 3), (column, 1 + 2 * over_rows)]
            tensors += [
                (student[0], 1),
                (teacher[0], 1),
                (torch.empty(4), over_columns),
                (torch.empty(samples + classes), 2),
            ]
            given = correlation.Operands(student, teacher, 1.0, 1.0, 1.0)
            words = "logits five times, gradient once, and what is known of rows and columns"
            yield Case("correlation", f"{samples}x{classes} {_short(dtype)}", (given, 1.0, None), tensors, words)


def _feature_cases() -> Iterator[Case]:
    for layout, codes in product((torch.contiguous_format, torch.channels_last), (False, True)):
        student, target = (torch.randn(4, 64, 28, 28).contiguous(memory_format=layout) for _ in range(2))
        scales = torch.ones(64) if codes else None
        target = target.to(torch.int8) if codes else target
        name = f"4x64x28x28 fp32, target {'int8' if codes else 'fp32'}, {_called(layout)}"
        known = torch.tensor(1.0)
        for kind, normalize, power, reads, rereads in (
            ("plain", None, None, 1, 1),
            ("power given", "power", known, 1, 1),
            ("power", "power", None, 1, 2),
            ("channel", "channel", None, 1, 2),
            ("l2", "l2", None, 2, 2),
        ):
            given = feature_mse.Operands(student, target, scales, normalize, power, 1)
            lookups = (rereads if codes else 0) + (normalize == "channel")
            yield _feature_case("feature_mse", f"{kind}: {name}", given, reads, rereads, lookups)
        for per, passes in (("position", 1), ("sample", 2)):
            given = feature_cosine.Operands(student, target, scales, per, 1)
            lookups = passes if codes else 0
            yield _feature_case("feature_cosine", f"per {per}: {name}", given, passes, passes, lookups)
        if not codes:
            yield _attention_case(name, student, target)


def _attention_case(name: str, student: Tensor, target: Tensor) -> Case:
    """Maps of one float32 per place are written once and read three times, pulls are written and read once."""
    given = attention_transfer.Operands(student, target, 2.0)
    maps, pulls = (torch.empty(count, *student.shape[2:]) for count in (2 * len(student), len(student)))
    tensors = [(student, 2), (target, 1), (student, 1), (maps, 4), (pulls, 2)]
    words = "student twice, target once, gradient once, and what places say"
    return Case("attention_transfer", name, (given, 1.0, None), tensors, words)


def _feature_case(op: str, name: str, given: FeatureOperands, reads: int, rereads: int, lookups: int) -> Case:
    student, target = given.student, given.target
    tensors = [(student, reads), (target, rereads), (student, 1), (_per_element(student), lookups)]
    words = f"student {_times(reads)}, target {_times(rereads)}, gradient once"
    return Case(op, name, (given, 1.0, None), tensors, words + _looked_up(lookups))


def _per_element(features: Tensor) -> Tensor:
    """Make a stand-in for the scale or weight of its channel that each element looks up."""
    return torch.empty_like(features, dtype=torch.float32)


def _row_cases() -> Iterator[Case]:
    for shape, layout, passes in (
        ((4, 64, 28, 28), torch.contiguous_format, 1),
        ((1, 4, 100, 100), torch.contiguous_format, 2),
        ((4, 64, 28, 28), torch.channels_last, 2),
    ):
        rows = torch.randn(shape).contiguous(memory_format=layout)
        codes, scales = torch.empty_like(rows, dtype=torch.int8), torch.ones(shape[:2])
        name = f"{'x'.join(map(str, shape))} fp32, {_called(layout)}"
        words = f"values {_times(passes)}, codes once"
        tensors = [(rows, passes), (codes, 1), (scales, 1)]
        yield Case("quantize_rows", name, (rows, torch.int8, 1), tensors, words)
        tensors = [(codes, 1), (rows, 1), (_per_element(rows), 1)]
        words = "codes once, values once" + _looked_up(1)
        yield Case("dequantize_rows", name, (codes.zero_(), scales, torch.float32, 1), tensors, words)


def _augment_case() -> Case:
    images, rows = torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.arange(8)
    offsets, flips = torch.full((8, 2), 4), torch.zeros(8, dtype=torch.bool)
    out = torch.empty(8, 3, 32, 32)
    arguments = (images, rows, offsets, flips, 4, [0.5] * 3, [0.5] * 3, torch.float32, False)
    tensors = [(images, 1), (rows, 1), (offsets, 1), (flips, 1), (out, 1)]
    return Case("augment_batch", "8x32x32x3, fp32 NCHW", arguments, tensors, "pixels once, images once")


def _norm_cases() -> Iterator[Case]:
    """Parts are put together by each program of the second kernel, which reads them all, or by a kernel of their own.
    Each program reads some vectors of its channels; what parts came to is two of them."""
    for shape, programs, readers, parts in (((32, 16, 32, 32), 128, 128, 128), ((64, 64, 32, 32), 1024, 1, 512)):
        x, residual, y, gradient = (
            torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last) for _ in range(4)
        )
        weight, sums, apart = torch.ones(shape[1]), torch.empty(2, parts, shape[1]), 2 * (readers == 1)
        name = f"{'x'.join(map(str, shape))} bf16"
        arguments = (x, residual, weight, weight, None, None, None, 0.1, 1e-5, True)
        tensors = [(x, 2), (residual, 1), (y, 1), (sums, 1 + readers), (weight, (2 + apart) * programs)]
        yield Case("batch_norm_act", name, arguments, tensors, "x twice, residual once, y once, and what parts say")
        arguments = (gradient, x, y, *[weight] * 4, 1e-5, True, True)
        tensors = [(gradient, 2), (x, 2), (y, 2), (x, 1), (residual, 1), (sums, 1 + readers)]
        tensors += [(weight, (4 + apart) * programs), (weight, 4 * parts)]
        words = "gradient, x and y twice, gradients of x and residual once, and what parts say"
        yield Case("batch_norm_act", f"{name}, backward", arguments, tensors, words, "batch_norm_act_backward")


def _times(passes: int) -> str:
    return "once" if passes == 1 else "twice"


def _looked_up(lookups: int) -> str:
    return f", {lookups} float32 of its channel per element" if lookups else ""


def _called(layout: torch.memory_format) -> str:
    return "NHWC" if layout == torch.channels_last else "NCHW"


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def main() -> None:
    # NumPy, which interprets the kernels, remarks on lanes whose values are never used.
    warnings.simplefilter("ignore", RuntimeWarning)
    ops = sys.argv[1:]
    for case in cases():
        if not ops or case.op in ops:
            found = count(case)
            print(json.dumps(asdict(found) | {"ratio": found.ratio}), flush=True)


if __name__ == "__main__":
    main()
