"""A data set of ImageNet's number of names: what opening, starting, keeping rows and going on cost.

    python -m stablekd_fast.bench.campaigns.imagenet_names --images PHOTOGRAPHS --folder EMPTY --json FILE

Makes 1,281,167 training and 50,000 test names in 1,000 classes, hard links to the photographs, walks over them with
`os.scandir` alone, and runs `stablekd distill` on them in processes of their own: killed after a few steps, gone on
with, and once more as another run that finds rows. Times are seconds to the first logged step; memory is the most that
the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stablekd_fast.report import machine, versions

CLASSES, TRAIN, TEST = 1000, 1_281_167, 50_000
SETTINGS = (
    "--method", "kd", "--teacher", "resnet20", "--student", "resnet20_half", "--image-size", "32", "--batch-size", "32",
    "--epochs", "2", "--views", "1", "--validation", "0", "--log-every", "1", "--checkpoint-every", "8",
    "--precision", "fp32", "--source", "torchvision",
)  # fmt: skip
STEPS = 24
PATIENCE = 600


def make_names(photographs: Path, folder: Path) -> None:
    """Fill `folder` with `train/CLASS/*` and `val/CLASS/*`, hard links to the photographs in turn."""
    found = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    made = 0
    for part, count in (("train", TRAIN), ("val", TEST)):
        for label in range(CLASSES):
            place = folder / part / f"n{label:08}"
            place.mkdir(parents=True)
            for number in range(count // CLASSES + (label < count % CLASSES)):
                os.link(found[made % len(found)], place / f"n{label:08}_{number}.JPEG")
                made += 1


def seconds_of_scandir(folder: Path) -> float:
    """How long it takes to see every name once, with nothing made of it."""
    begun, todo = time.perf_counter(), [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            todo += [entry.path for entry in entries if entry.is_dir()]
    return time.perf_counter() - begun


def teacher_file(folder: Path) -> Path:
    """An untrained teacher of as many classes: what is measured does not depend on what it knows."""
    from stablekd_fast import models
    from stablekd_fast.engine.checkpoint import save_tensors

    save_tensors(folder / "teacher.safetensors", models.build("resnet20", CLASSES, 32).state_dict(), {})
    return folder / "teacher.safetensors"


def run(command: list[str], out: Path) -> dict:
    """Start a run, kill it after `STEPS` more steps; return seconds to its first step, and the most memory."""
    log, begun = out / "events.jsonl", time.perf_counter()
    before = len(_steps(log))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first, megabytes = None, 0.0
    while time.perf_counter() - begun < PATIENCE:
        if process.poll() is not None:
            raise RuntimeError(f"The run ended by itself: {process.stderr.read() if process.stderr else ''}")
        megabytes = max(megabytes, _most_memory(process.pid))
        new = len(_steps(log)) - before
        if new > 0 and first is None:
            first = time.perf_counter() - begun
        if new >= STEPS:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {"seconds to the first step": first, "most memory, MB": megabytes}


def _steps(log: Path) -> list[str]:
    if not log.exists():
        return []
    return [line for line in log.read_text().splitlines() if '"kind": "train"' in line]


def _most_memory(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def _megabytes(folder: Path, pattern: str) -> float:
    return sum(path.stat().st_size for path in folder.glob(pattern)) / 1e6


def measure(photographs: Path, folder: Path) -> dict:
    """Measure everything below `folder`, which is left with the names."""
    data, rows = folder / "data", folder / "rows"
    if not data.exists():
        make_names(photographs, data)
    distill = [sys.executable, "-m", "stablekd_fast", "distill", *SETTINGS, "--data", str(data)]
    distill += ["--teacher-weights", str(teacher_file(folder))]
    cache = ["--cache.directory", str(rows), "--cache.plan", "all"]
    found = {"os.scandir alone, s": [seconds_of_scandir(data) for _ in range(3)]}
    for name, more in (
        ("first start", []), ("going on", ["--resume"]), ("first start, rows kept", cache),
        ("going on, rows kept", [*cache, "--resume"]), ("another run, rows found", cache),
    ):  # fmt: skip
        out = folder / (
            "other" if name.startswith("another") else "rows_run" if more and more[0] == cache[0] else "plain"
        )
        found[name] = run([*distill, *more, "--out", str(out)], out)
        found[name] |= {
            "checkpoint, MB": _megabytes(out, "checkpoint.safetensors"), "digests, MB": _megabytes(out, "images.log"),
            "index of rows, MB": _megabytes(rows, "*/manifest*") + _megabytes(rows, "images-*.log"),
        }  # fmt: skip
        print(name, json.dumps(found[name]), flush=True)
    return {**found, "machine": machine(), "versions": versions()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs that names are linked to")
    parser.add_argument("--folder", type=Path, required=True, help="where names, rows and runs go; on the same disk")
    parser.add_argument("--json", type=Path, help="file for what was found")
    asked = parser.parse_args()
    result = measure(asked.images, asked.folder)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
