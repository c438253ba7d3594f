"""How long it takes to save a state, beside safetensors by itself.

    python tests/proof/checkpoint_time.py FOLDER [--rounds N] [--megabytes N]

All take turns in shuffled rounds, each to a new file that is flushed to the disk and renamed. FOLDER lies on the disk
that is meant. A ratio is the median over the rounds, each by its own times; then that of the least times.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch

from stablekd_fast.engine.checkpoint import save_tensors
from stablekd_fast.files import sealed, write_atomically


def save_file(path, tensors):
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file(tensors, temporary, {"stablekd": "{}"})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_bytes(path, tensors):
    write_atomically(path, safetensors.torch.save(tensors, {"stablekd": "{}"}))


def save_ours(path, tensors):
    save_tensors(path, tensors, {})


def save_without_digests(path, tensors):
    with mock.patch.object(sealed, "_all_told", lambda *_: {}):
        save_tensors(path, tensors, {})


def save_with_sha256(path, tensors):
    with mock.patch.object(sealed, "FORMAT", "1"):
        save_tensors(path, tensors, {})


WAYS = {
    "safetensors.torch.save_file, fsync, rename": save_file,
    "safetensors.torch.save, write, fsync, rename": save_bytes,
    "ours": save_ours,
    "ours without digests": save_without_digests,
    "ours with digests by SHA-256 (format 1)": save_with_sha256,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--megabytes", type=int, default=100)
    asked = parser.parse_args()
    tensors = {f"layer{number}.weight": torch.randn(500, 1000) for number in range(asked.megabytes // 2)}
    times, path = {name: [] for name in WAYS}, asked.folder / "state.safetensors"
    for _ in range(asked.rounds):
        for name in random.sample(list(WAYS), len(WAYS)):
            path.unlink(missing_ok=True)
            os.sync()
            start = time.perf_counter()
            WAYS[name](path, tensors)
            times[name].append(time.perf_counter() - start)
    first, second = (times[name] for name in list(WAYS)[:2])
    print("| saved by | least, ms | median, ms | to save_file: median ratio, ratio of least | to save: the same |")
    print("|---|---|---|---|---|")
    for name, own in times.items():
        ratios = [
            f"{statistics.median(a / b for a, b in zip(own, other)):.2f}, {min(own) / min(other):.2f}"
            for other in (first, second)
        ]
        print(f"| {name} | {1e3 * min(own):.1f} | {1e3 * statistics.median(own):.1f} | {' | '.join(ratios)} |")
    path.unlink()


if __name__ == "__main__":
    main()
