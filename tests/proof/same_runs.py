"""Proof of value: a change that should alter no number alters no number.

    python tests/proof/same_runs.py record BEFORE        # with the package as it was
    python tests/proof/same_runs.py record AFTER         # with the package as it is
    python tests/proof/same_runs.py compare BEFORE AFTER

`record` makes real runs through the `stablekd` command of the interpreter it runs under: the demo, and runs that
between them use a cache (int8), an average with accumulation and cutmix, a resume after SIGKILL, and two ranks in fp32
and bf16. `compare` asks for the same bytes of every `student.safetensors`, and for the same events, results and pages
but for what is measured with a clock, paths, and the machine. Both recordings must come from one machine, with the same
versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MEASURED = {
    "time", "images_per_second", "wall_seconds", "data_wait_share", "predicted_seconds", "predicted_seconds_relay",
    "live_ms", "kept_ms", "predicted_ms", "measured_ms", "idle_share", "live_batches",
}  # fmt: skip
"""Fields of events and results that come from a clock; `live_batches`, as it depends on how soon one rank sees the rows
that another has stored."""

OF_THE_PLACE = {"machine", "out", "directory", "teacher_weights"}
"""Fields that say where a run was made."""

COLUMNS = {"images/s", "time"}
"""Columns of tables in pages that come from a clock."""

SHOWN = 5
"""Differences of one file that are printed."""

PAIR = ["--teacher", "resnet32", "--student", "resnet20", "--device", "cpu", "--validation", "0.1", "--log-every", "2"]


def record(out: Path) -> None:
    """Make all runs below `out`, one after the other."""
    out.mkdir(parents=True)
    _stablekd("demo", "--data", "digits", "--out", out / "demo", "--device", "cpu")
    teacher = ["--teacher-weights", out / "demo/runs/teacher/student.safetensors"]
    common = ["distill", *PAIR, *teacher, "--recipe", "progressive", "--views", 2]
    one = [*common, "--precision", "fp32"]
    rows = ["--cache.plan", "all", "--cache.directory"]
    _stablekd(*one, "--epochs", 3, *rows, out / "rows", "--cache.codecs", "[int8]", "--out", out / "cached")
    mixed = ["--ema", 0.9, "--accumulate", 2, "--mix", "cutmix"]
    _stablekd(*one, "--epochs", 2, *mixed, "--out", out / "mixed")
    _killed([*one, "--epochs", 2, "--checkpoint-every", 24, "--out", out / "resumed"], out / "resumed", after=24)
    _stablekd(*one, "--epochs", 2, "--checkpoint-every", 24, "--out", out / "resumed", "--resume")
    for precision in ("fp32", "bf16"):
        for axis in ("blocks", "data"):
            name = f"ranks-{axis}-{precision}"
            shared = [*common, "--epochs", 2, "--precision", precision, "--parallel", axis]
            _stablekd(*shared, *rows, out / f"{name}-rows", "--out", out / name, ranks=2)


def _stablekd(*words: object, ranks: int = 1) -> None:
    subprocess.run(_command(words, ranks), check=True, env=_environment())


def _command(words: tuple | list, ranks: int = 1) -> list[str]:
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *several, "stablekd_fast", *map(str, words)]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _killed(words: list, out: Path, after: int) -> None:
    """Start a run and kill it once it has saved step `after`."""
    process = subprocess.Popen(_command(words), env=_environment())
    while not any(event == {"kind": "checkpoint", "step": after} for event in _kinds_and_steps(out / "events.jsonl")):
        if process.poll() is not None:
            raise RuntimeError(f"The run was over before it was killed: exit code {process.returncode}.")
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _kinds_and_steps(path: Path) -> Iterator[dict]:
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return ({name: json.loads(line).get(name) for name in ("kind", "step")} for line in whole)


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two recordings, a line each; none if they are the same."""
    found = []
    files = {
        folder: sorted(
            str(path.relative_to(folder))
            for pattern in ("student.safetensors", "events.jsonl", "results.json", "report.html")
            for path in folder.rglob(pattern)
        )
        for folder in (before, after)
    }
    if not files[before]:
        return [f"{before} holds no run"]
    if files[before] != files[after]:
        return [f"files: {sorted(set(files[before]) ^ set(files[after]))} are in one of the two only"]
    for name in files[before]:
        lines = list(_differences(before / name, after / name))
        found += [f"{name}: {line}" for line in lines[:SHOWN]]
        found += [f"{name}: and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return found


def _differences(before: Path, after: Path) -> Iterator[str]:
    if before.suffix == ".safetensors":
        if _tensors(before) != _tensors(after):
            yield "other bits"
    elif before.suffix == ".html":
        yield from _unequal(comparable_page(before.read_text()), comparable_page(after.read_text()))
    elif before.suffix == ".jsonl":
        lines = [[comparable(json.loads(line)) for line in path.read_text().splitlines()] for path in (before, after)]
        yield from _unequal(*lines)
    else:
        yield from _unequal(*([comparable(json.loads(path.read_text()))] for path in (before, after)))


def _tensors(path: Path) -> bytes:
    """A safetensors file without its header's text, which may name a path: names, types, shapes, and all bytes of
    values."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + content[start:]


def _unequal(before: list, after: list) -> Iterator[str]:
    if len(before) != len(after):
        yield f"{len(before)} entries became {len(after)}"
    for number, (one, other) in enumerate(zip(before, after), 1):
        if one != other:
            yield f"entry {number}: {one} became {other}"


def comparable(value: object) -> object:
    """Plain values without what a clock or the place decides."""
    if isinstance(value, dict):
        if value.get("kind") == "ranks":  # which of them trains a group is decided from measured costs
            groups = sorted(group for rank in value["ranks"] for group in rank["groups"])
            value = {**value, "groups": groups, "ranks": [{**rank, "groups": None} for rank in value["ranks"]]}
        return {name: comparable(item) for name, item in value.items() if name not in MEASURED | OF_THE_PLACE}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def comparable_page(text: str) -> list[str]:
    """The lines of a page without cells and settings that a clock or the place decides."""
    text = re.sub(r"-[mp][0-9a-f]{10}\b", "-id", text)  # matplotlib names parts of a figure at random
    text = re.sub(r"<table.*?</table>", _without_measured_columns, text, flags=re.DOTALL)
    text = re.sub(r"<h3>Machine</h3><dl>.*?</dl>", "", text, flags=re.DOTALL)
    place = "|".join(re.escape(name) for name in OF_THE_PLACE)
    text = re.sub(rf"<dt>(?:[\w.]+\.)?(?:{place})</dt><dd>.*?</dd>", "", text, flags=re.DOTALL)
    return text.splitlines()


def _without_measured_columns(match: re.Match) -> str:
    names = re.findall(r"<th[^>]*>(.*?)</th>", match[0], flags=re.DOTALL)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL) for row in match[0].split("<tr>")[2:]]
    gone = COLUMNS | OF_THE_PLACE
    return str([[cell for name, cell in zip(names, row) if name not in gone] for row in [names, *rows]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("record").add_argument("out", type=Path)
    two = commands.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "record":
        record(chosen.out.resolve())
        return 0
    found = differences(chosen.before, chosen.after)
    count = len(list(chosen.before.rglob("student.safetensors")))
    print("\n".join(found) or f"{count} runs are the same: students to the bit, events, results and pages.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
