"""Shows what can be shown of the Triton kernels without a GPU: how they compile for real chips, and the bytes moved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

from rich import box
from rich.table import Table

from stablekd_fast.bench.operators import aot, traffic
from stablekd_fast.errors import StableKDError


class Proof(NamedTuple):
    """The rows of `aot.Compiled` and of `traffic.Traffic`, and in words what breaks a promise."""

    compiled: list[dict]
    moved: list[dict]
    faults: list[str]


def prove(ops: Sequence[str] = (), every_variant: bool = False) -> Proof:
    """Compile a covering sample of the variants of `ops` (or all of them) and count the bytes of their cases.

    Raises ConfigError for operators without Triton kernels, and without Triton.
    """
    ops = list(ops) or aot.operators()
    aot.check_operators(ops)
    compiled = list(compiled_rows(ops, "every" if every_variant else "pairs"))
    moved = list(traffic_rows(ops))
    faults = [
        f"{row['op']}: {row['kernel']} for sm_{row['architecture']} {row['fault']}; {row['types']} {row['constants']}"
        for row in compiled
        if row["fault"]
    ]
    faults += [
        f"{row['op']}: {row['case']} moves {row['ratio']:.3f} times the least bytes"
        for row in moved
        if row["ratio"] > traffic.LIMIT
    ]
    return Proof(compiled, moved, faults)


def compiled_rows(ops: Sequence[str], sample: str = "pairs") -> Iterator[dict]:
    """Yield rows of `aot.Compiled` for a sample of `aot.SAMPLES`."""
    return _rows(aot, [*ops, "--sample", sample], interpreted=False)


def traffic_rows(ops: Sequence[str]) -> Iterator[dict]:
    """Yield rows of `traffic.Traffic` with their ratio."""
    return _rows(traffic, ops, interpreted=True)


def _rows(module: ModuleType, words: Sequence[str], interpreted: bool) -> Iterator[dict]:
    """Yield what a module prints in a process of its own: whether Triton interprets is settled when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    command = [sys.executable, "-m", module.__name__, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise StableKDError(f"{module.__name__} failed with exit code {process.returncode}; its error is above.")


def kernel_table(rows: Sequence[dict]) -> Table:
    """Show one line per kernel: the most of each resource in any variant and chip; how many have 128-bit accesses."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    for name in ("compiled", "registers", "spilled", "shared", "wide loads", "wide stores"):
        table.add_column(name, justify="right")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        most = (str(max(row[name] for row in own)) for name in ("registers", "spilled_bytes", "shared_bytes"))
        wide = (f"{sum('128' in row[name] or '256' in row[name] for row in own)}" for name in ("loads", "stores"))
        table.add_row(kernel, str(len(own)), *most, *wide)
    return table


def traffic_table(rows: Sequence[dict]) -> Table:
    """Show one line per case: bytes moved over the least, and what the least is."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("operator", "case", "least"):
        table.add_column(name, overflow="fold")
    table.add_column("moved / least", justify="right")
    for row in rows:
        table.add_row(row["op"], row["case"], row["passes"], f"{row['ratio']:.4f}")
    return table
