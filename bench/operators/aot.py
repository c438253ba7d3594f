"""Triton kernels compiled ahead of time for real chips, on a machine that needs none of them.

Variants that the dispatcher can reach (`specialisations()` of each `triton_impl`) are compiled to machine code with the
assembler that Triton brings, and the code is read: registers, spills, shared memory, and how wide its accesses to
global memory are. Nothing is run. `python -m stablekd_fast.bench.operators.aot` prints one JSON row per compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

from stablekd_fast import kernels
from stablekd_fast.bench.operators.covering import covering_sample
from stablekd_fast.errors import ConfigError, nearest
from stablekd_fast.kernels import _triton
from stablekd_fast.kernels._launch import REGISTERS, Listed, Specialisation

ARCHITECTURES = (80, 86, 89, 90, 100)
"""Compute capabilities, times ten."""

Job = tuple[str, Specialisation, int]
"""An operator, a variant of its kernel, and a chip."""


@dataclass(frozen=True)
class Compiled:
    """What one variant became on one chip. `loads`, `stores`: bits of an access to global memory -> how many."""

    op: str
    kernel: str
    types: dict[str, str | None]
    constants: dict[str, int]
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    fault: str | None
    """What is wrong with the code, in words."""


def operators() -> list[str]:
    """Return the operators that have Triton kernels."""
    return sorted(path.parent.name for path in Path(kernels.__file__).parent.glob("*/triton_impl.py"))


def check_operators(ops: Iterable[str]) -> None:
    """Raise ConfigError where Triton is missing, and for operators without a Triton kernel."""
    if _triton.missing:
        raise ConfigError(f"Nothing can be compiled: {_triton.missing}.")
    known = operators()
    for op in ops:
        if op not in known:
            raise ConfigError(f"There is no Triton kernel of an operator {op!r}{nearest(op, known)}.")


def reachable(ops: Iterable[str]) -> Iterator[tuple[str, Listed]]:
    """Yield (operator, Listed) for every variant of the operators."""
    for op in ops:
        for listed in import_module(f"stablekd_fast.kernels.{op}.triton_impl").specialisations():
            yield op, listed


def every(ops: Iterable[str]) -> list[Job]:
    """Return all variants for all chips."""
    return [(op, listed.variant, chip) for (op, listed), chip in product(reachable(ops), ARCHITECTURES)]


def covering(ops: Iterable[str]) -> list[Job]:
    """Choose a few of `every`. Each pair of types, constants or chip that occurs in a variant still occurs together.

    The choice is the same on every run.
    """
    draw = random.Random(0)
    return [job for jobs in _by_kernel(every(ops)) for job in covering_sample(jobs, _pairs, draw)]


def each(ops: Iterable[str]) -> list[Job]:
    """Choose fewer still: each type, constant and chip that occurs in a variant of a kernel still occurs."""
    draw = random.Random(0)
    return [job for jobs in _by_kernel(every(ops)) for job in covering_sample(jobs, _values, draw)]


def _by_kernel(jobs: Iterable[Job]) -> Iterable[list[Job]]:
    """Return the jobs of each kernel. A kernel that several operators use appears once."""
    kernels, known = {}, set()
    for job in jobs:
        if job[1:] not in known:
            known.add(job[1:])
            kernels.setdefault(job[1].kernel, []).append(job)
    return kernels.values()


def _values(job: Job) -> list:
    _, variant, chip = job
    return [*variant.types, *variant.constants, ("chip", chip)]


def _pairs(job: Job) -> set:
    return set(combinations(_values(job), 2))


SAMPLES = {"each": each, "pairs": covering, "every": every}
"""Ways to choose variants: every value once, every pair of values, all of them."""


def compiled(jobs: Sequence[Job]) -> Iterator[Compiled]:
    """Compile the jobs in parallel processes, without Triton's cache on disk; yield them in the order given.

    Raises ConfigError under Triton's interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET=1 is set, under which Triton compiles nothing; unset it.")
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["stablekd_fast.bench.operators.aot"])
    with TemporaryDirectory() as folder:
        with ProcessPoolExecutor(None, processes, _cache_in, (folder,)) as pool:
            yield from pool.map(_compile, jobs, chunksize=4)


def _cache_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


@cache
def _listed(op: str) -> dict[Specialisation, Listed]:
    return {listed.variant: listed for _, listed in reachable([op])}


def _compile(job: Job) -> Compiled:
    op, variant, chip = job
    return compile_one(op, _listed(op)[variant], chip)


def compile_one(op: str, listed: Listed, chip: int) -> Compiled:
    """Compile one `Listed` with the options of its launch, for compute capability `chip` / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = listed.variant
    types, constants = dict(variant.types), dict(variant.constants)
    names = listed.function.arg_names
    absent = {name: None for name, kind in types.items() if kind is None}
    pointers = [name for name, kind in types.items() if kind and kind.startswith("*")]
    source = ASTSource(
        fn=listed.function,
        signature={name: types.get(name) or "constexpr" for name in names},
        constexprs={(names.index(name),): value for name, value in (constants | absent).items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": variant.warps, "maxnreg": REGISTERS}
    result = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, spilled, shared, loads, stores = _read(result.asm["cubin"])
    fault = _fault(listed, spilled, loads, stores)
    shared = max(shared, result.metadata.shared)
    return Compiled(op, variant.kernel, types, constants, chip, registers, spilled, shared, loads, stores, fault)


def _fault(listed: Listed, spilled: int, loads: dict[int, int], stores: dict[int, int]) -> str | None:
    if spilled:
        return f"spills {spilled} bytes"
    for promised, found, name in ((listed.wide_loads, loads, "loads"), (listed.wide_stores, stores, "stores")):
        if promised and max(found, default=0) < 128:
            return f"promises {name} of 128 bits, and has (bits: how many) {found}"
    return None


def _read(cubin: bytes) -> tuple[int, int, int, dict[int, int], dict[int, int]]:
    """Read registers, spilled bytes, static shared bytes, and widths of global loads and stores from machine code."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED", "LOCAL")}
    widths = {"LDG": Counter(), "STG": Counter()}
    for kind, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", code):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        widths[kind][int(bits[1]) if bits else 32] += 1
    spilled = max(found["STACK"], found["LOCAL"])
    return found["REG"], spilled, found["SHARED"], dict(widths["LDG"]), dict(widths["STG"])


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="operators; all by default")
    parser.add_argument("--sample", choices=SAMPLES, default="pairs", help="which variants")
    options = parser.parse_args()
    for row in compiled(SAMPLES[options.sample](options.ops or operators())):
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
