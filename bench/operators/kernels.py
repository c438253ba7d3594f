"""`stablekd bench kernels`: the operators against eager and compiled PyTorch, and against the memory's speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from stablekd_fast.bench.core import Case, Measured, measure_cases, pinned
from stablekd_fast.bench.operators.augmentation import augment_batch_cases
from stablekd_fast.bench.operators.features import (
    attention_transfer_cases,
    dequantize_rows_cases,
    feature_cosine_cases,
    feature_mse_cases,
    quantize_rows_cases,
)
from stablekd_fast.bench.operators.losses import (
    Setting,
    correlation_cases,
    decoupled_kl_cases,
    grouped_kl_cases,
    kd_loss_cases,
    standardised_kd_loss_cases,
)
from stablekd_fast.bench.operators.norms import batch_norm_act_cases
from stablekd_fast.errors import ConfigError, nearest
from stablekd_fast.kernels._native import core

CASES: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "kd_loss": kd_loss_cases,
    "decoupled_kl": decoupled_kl_cases,
    "grouped_kl": grouped_kl_cases,
    "correlation": correlation_cases,
    "standardised_kd_loss": standardised_kd_loss_cases,
    "feature_mse": feature_mse_cases,
    "feature_cosine": feature_cosine_cases,
    "attention_transfer": attention_transfer_cases,
    "quantize_rows": quantize_rows_cases,
    "dequantize_rows": dequantize_rows_cases,
    "augment_batch": augment_batch_cases,
    "batch_norm_act": batch_norm_act_cases,
}


def run_kernels(
    setting: Setting,
    ops: Sequence[str] = (),
    *,
    rounds: int = 15,
    threads: int | None = None,
    show: Callable[[list[dict]], None] = lambda rows: None,
) -> Measured:
    """Measure all cases of `ops` (all operators by default), and show each case's rows as it is done.

    `threads` (all usable cores by default) serve every contender; the settings name the instruction set of the C++
    core. A case with a wrong result has no rows; the others are measured all the same. Raises ConfigError for unknown
    operators and fewer than one thread.
    """
    _check(ops, threads)
    with pinned(threads) as pins:
        measured = measure_cases(_cases(setting, ops or list(CASES)), rounds, show, device=setting.device)
    level = None if core is None else core.level()
    measured.settings = {"device": setting.device, "quick": setting.quick, "level": level, **pins}
    return measured


def _cases(setting: Setting, ops: Sequence[str]) -> Iterator[Case]:
    for op in ops:
        for case in CASES[op](setting):
            yield case
            # Compiled functions of this case would count towards the limit on recompilations of the next.
            torch.compiler.reset()


def _check(ops: Sequence[str], threads: int | None) -> None:
    for op in ops:
        if op not in CASES:
            raise ConfigError(f"There is no bench of an operator {op!r}{nearest(op, CASES)}.")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads} was given; it must be at least 1.")
